"""Multitask prompt tuning (arXiv 2303.02861): soft tokens ``P ⊙ (c_t r_t)`` of task ``t``.

``P`` is shared by all tasks, the columns ``c_t`` and rows ``r_t`` are a task's own. An adapter is
one task of its files.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules, Used, is_rank
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES, read_prompt
from turret.server.adapters.peft_format.tasks import check_task, task_warning

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_START = Irrelevant("sets the starting point of training")

MULTITASK_PROMPT_RULES: Rules = {
    **PROMPT_RULES,
    "num_tasks": Used(is_rank),
    "num_ranks": Used(is_rank),
    "prompt_tuning_init": _START,
    "prompt_tuning_init_text": _START,
    "prompt_tuning_init_state_dict_path": _START,
    "prompt_tuning_init_task": _START,
    "tokenizer_name_or_path": Irrelevant("read with prompt_tuning_init_text"),
    "tokenizer_kwargs": Irrelevant("read with prompt_tuning_init_text"),
}


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    own = {name: t for name, t in checkpoint.tensors.items() if name in (_COLUMNS, _ROWS)}
    rest = {name: t for name, t in checkpoint.tensors.items() if name not in own}
    rules = MULTITASK_PROMPT_RULES
    tensor = read_prompt(replace(checkpoint, tensors=rest), rules, 1, findings)
    for key in ("num_tasks", "num_ranks"):
        if key not in config:
            findings.add(key, "is required")
    task = check_task(checkpoint, "num_tasks", findings)
    for name in {_COLUMNS, _ROWS} - own.keys():
        findings.add(name, "is missing")
    is_sized = tensor is not None and not findings.fields & {"num_tasks", "num_ranks"}
    if is_sized and tensor is not None and len(own) == 2:
        tasks, rank, (tokens, width) = config["num_tasks"], config["num_ranks"], tensor.shape
        findings.check_shape(_COLUMNS, own[_COLUMNS], (tasks, tokens, rank), of_base=False)
        findings.check_shape(_ROWS, own[_ROWS], (tasks, rank, width), of_base=False)
        if width != base.hidden_size:
            why = f"is {width}, the base model's hidden size is {base.hidden_size}"
            findings.mismatch("token_dim", why)
    findings.raise_if_any()
    assert tensor is not None  # or there was a fault
    wide = torch.promote_types(tensor.dtype, torch.float32)
    of_task = own[_COLUMNS][task].to(wide) @ own[_ROWS][task].to(wide)
    prompt = SoftPrompt(soft_tokens=(tensor.to(wide) * of_task).to(base.dtype).contiguous())
    return finish(
        checkpoint,
        base,
        prompt=prompt,
        warnings=task_warning(task, config["num_tasks"]),
        depends_on_base=False,
    )


METHOD = Method(
    "multitask_prompt",
    {"MULTITASK_PROMPT_TUNING"},
    MULTITASK_PROMPT_RULES,
    lower,
    has_tasks=True,
)
