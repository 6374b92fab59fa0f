"""Keys and values before position 0 of the text, from a checkpoint of whichever method.

PEFT saves them per virtual token as ``layers · 2 · token_dim`` numbers, layer by layer, key before
value. The keys are attended to as they are: they stand where rotated keys stand, and are not
rotated again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.soft_prompt import PrefixKv, SoftPrompt
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_rank
from turret.server.adapters.peft_format.config.vocabulary_rules import is_modules_to_save
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES, read_prompt


def _is_heads(value: Any) -> str | None:
    return None if value is None else is_rank(value)


PREFIX_RULES: Rules = {
    **PROMPT_RULES,
    "modules_to_save": Used(is_modules_to_save),
    "num_layers": Used(_is_heads),
    "num_attention_heads": Used(_is_heads),
}


def prefix_method(name: str, peft_type: str, rules: Rules) -> Method:
    """A method whose file holds ``prompt_embeddings``, ``[tokens, layers · 2 · token_dim]``."""
    return Method(name, {peft_type}, rules, functools.partial(_lower, rules))


def _lower(rules: Rules, checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    findings = Findings(checkpoint.path, base.name)
    _check_sizes(checkpoint.config, base, findings)
    # The width is the base's unless the sizes above already disagree.
    layers = base.num_layers if not findings.mismatched else _layers(checkpoint)
    tensor = read_prompt(checkpoint, rules, 2 * layers, findings)
    findings.raise_if_any()
    assert tensor is not None  # or there was a fault
    stored = tensor.to(base.dtype).view(-1, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    keys, values = stored.permute(2, 1, 0, 3, 4)
    prompt = SoftPrompt(prefix=PrefixKv(keys.contiguous(), values.contiguous()))
    return finish(checkpoint, base, prompt=prompt, depends_on_base=False)


def _layers(checkpoint: AdapterCheckpoint) -> int:
    value = checkpoint.config.get("num_layers")
    return value if isinstance(value, int) else 0


def _check_sizes(config: Mapping[str, Any], base: BaseModel, findings: Findings) -> None:
    """The shape of the base's key-value cache against the one the adapter was made for."""
    sizes = {
        "num_layers": base.num_layers,
        "token_dim": base.num_kv_heads * base.head_dim,
        "num_attention_heads": base.num_kv_heads,
    }
    for key, served in sizes.items():
        value = config.get(key)
        # Wrong types are the rules' business.
        if isinstance(value, int) and value != served:
            findings.mismatch(key, f"is {value}, the base model's is {served}")
