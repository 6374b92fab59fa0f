"""The reference of a verification: transformers' and PEFT's own forward pass."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper

from turret.training.base_model import without_peft_warnings


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The model's log probabilities for an answer, given its prompt.

    Returns:
        ``[tokens, 2]`` in fp32: the log probability of each token of the answer, and that of the
        likeliest token in its place.
    """
    # With a prefix or a soft prompt, there are more logits than tokens.
    ids = torch.tensor([[*prompt, *answer]])
    with without_peft_warnings():
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
    rows = logits.float().log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(answer)[:, None])
    return torch.cat((chosen, rows.max(1, keepdim=True).values), dim=1)


class Adapted:
    """A base model with an adapter; groups of the adapter's tensors can be left out.

    Attributes:
        model: The model; its forward pass uses the adapter.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        config = PeftConfig.from_pretrained(str(directory))
        for name in ("init_lora_weights", "init_weights"):
            # An adapter with random initial weights would change the base.
            if getattr(config, name, None) is False:
                setattr(config, name, True)
        self.model = PeftModelForCausalLM(model, config)  # type: ignore[arg-type]
        self._fresh = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self._fresh = {key: value.clone() for key, value in self._fresh.items()}
        self._file = load_peft_weights(str(directory), device="cpu")
        self._put(self._file)
        self.model.eval()

    def _put(self, state: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, dict(state))

    def groups(self) -> dict[str, list[str]]:
        """The file's keys by kind of module, such as ``q_proj``; empty if there is only one."""
        prefix = getattr(self.model.base_model, "prefix", None)
        found: dict[str, list[str]] = {}
        for key in sorted(self._file.keys() & self._fresh.keys()):
            module = re.split(rf"\.{re.escape(prefix)}", key)[0] if prefix else key
            if module == key:
                module = key.rpartition(".")[0]
            found.setdefault(module.rpartition(".")[2] or key, []).append(key)
        return found if len(found) > 1 else {}

    @contextlib.contextmanager
    def without(self, keys: Sequence[str]) -> Iterator[None]:
        """Use the adapter without some of its tensors: they have the values of a new adapter."""
        self._put({**self._file, **{key: self._fresh[key] for key in keys}})
        try:
            yield
        finally:
            self._put(self._file)


@contextlib.contextmanager
def adapted(model: Any, directory: Path) -> Iterator[Adapted]:
    """Put an adapter on a model, and remove it at the end of the block."""
    with without_peft_warnings():
        made = Adapted(model, directory)
    try:
        yield made
    finally:
        # A soft prompt does not change the model.
        if not made.model.active_peft_config.is_prompt_learning:
            # PEFT leaves its copies of ``modules_to_save`` in place.
            originals = {
                name: module.original_module
                for name, module in model.named_modules()
                if isinstance(module, ModulesToSaveWrapper)
            }
            made.model.unload()
            for name, original in originals.items():
                model.set_submodule(name, original)
