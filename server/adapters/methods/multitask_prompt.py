"""Multitask prompt tuning (arXiv 2303.02861): soft tokens ``P ⊙ (c_t r_t)`` of task ``t``.

All tasks share ``P``, and each task has its own columns ``c_t`` and rows ``r_t``. An adapter
serves one of the tasks in its file.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import WITH_TEXT, SoftTokens

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    tasks, rank = config["num_tasks"], config["num_ranks"]
    return {
        _COLUMNS: (tasks, config["num_virtual_tokens"], rank),
        _ROWS: (tasks, rank, config["token_dim"]),
    }


def _prompt(tensors: Mapping[str, torch.Tensor], task: int) -> torch.Tensor:
    prompt = tensors["prompt_embeddings"]
    wide = torch.promote_types(prompt.dtype, torch.float32)
    own = tensors[_COLUMNS][task].to(wide) @ tensors[_ROWS][task].to(wide)
    return prompt.to(wide) * own


METHOD = SoftTokens(
    name="multitask_prompt",
    peft_types={"MULTITASK_PROMPT_TUNING"},
    keys={"num_tasks": fault_of_rank, "num_ranks": fault_of_rank},
    ignored={
        "prompt_tuning_init": START,
        "prompt_tuning_init_text": START,
        "prompt_tuning_init_state_dict_path": START,
        "prompt_tuning_init_task": START,
        **WITH_TEXT,
    },
    required=("num_tasks", "num_ranks"),
    tasks="num_tasks",
    more_tensors=_shapes,
    prompt=_prompt,
)
