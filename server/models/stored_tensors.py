"""The language model's tensors of a checkpoint, by the names that it alone has for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Experts
from turret.server.models.weights.expert_stacks import ExpertStacks
from turret.server.words import say

# The checkpoint of a multimodal model has a language model, a vision tower and a projector between
# them. Only the language model is read, because requests are text.

# Prefixes of the language model within a multimodal model, as checkpoints write them (the names
# before transformers 4.52) and as current models do.
_TEXT = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# The other modules of these models.
_OTHERS = ("vision_tower.", "multi_modal_projector.", "visual.")
_SKIPPED = (*_OTHERS, *(f"model.{name}" for name in _OTHERS))


def text_name(name: str) -> str | None:
    """The tensor's name in the language model; None if it belongs to another part."""
    if name.startswith(_SKIPPED):
        return None
    for prefix, own in _TEXT:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


# Weights in 8-bit floats (E4M3, arXiv 2209.05433) with a scale, or one for each of their blocks.
# Ministral 3, Qwen3's ``-FP8`` releases and older checkpoints of llm-compressor use this format.

DTYPE = "F8_E4M3"
# Suffixes of a weight's scale. DeepSeek's files call it inverse but mean this same factor.
SCALES = ("_scale_inv", "_scale")
# Scales for 8-bit activations and KV caches, which turret does not use.
NOT_USED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".kv_scale")


def dequantize_float8(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """The numbers that a weight stands for.

    Args:
        codes: ``[out, in]`` float8_e4m3fn.
        scale: A number, or ``[⌈out / rows⌉, ⌈in / columns⌉]``, in any float.
        block: Rows and columns that have a scale in common; needed for more scales than one.

    Returns:
        ``[out, in]`` fp32.

    Raises:
        ValueError: There are not as many scales as blocks.
    """
    values, scale = codes.float(), scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    out, inner = values.shape
    # Without a block size, each row of the weight has one scale.
    rows, columns = block or (1, inner)
    scale = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    expected = -(-out // rows), -(-inner // columns)
    if tuple(scale.shape) != expected:
        raise ValueError(say("SCALES_MISMATCH", found=list(scale.shape), expected=list(expected)))
    spread = scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inner]
    return values * spread


_BYTES = "U8"
_WEIGHT = ".weight"


class StoredTensors:
    """Reads tensors across files, as if each were stored by itself and as numbers.

    Experts that lie in one tensor are tensors of their own, and a weight in 8-bit floats is the
    numbers that it stands for.

    Args:
        files: The checkpoint's.
        experts: Of the architecture, or None.
        block: Rows and columns of a weight in 8-bit floats that have a scale in common, or None.
    """

    def __init__(
        self,
        files: Sequence[Path],
        experts: Experts | None,
        block: tuple[int, int] | None = None,
    ) -> None:
        self._files = [safe_open(path, framework="pt") for path in files]
        # Name → file, and the tensor's name in that file.
        self._owner = {
            name: (file, stored)
            for file in self._files
            for stored in file.keys()  # noqa: SIM118 - safe_open is not a mapping
            if (name := text_name(stored)) is not None and not name.endswith(NOT_USED)
        }
        self._block = block
        # Weight → its scales.
        self._scales: dict[str, tuple[safe_open, str]] = {}
        for name in [name for name in self._owner if self._is_float8(name)]:
            scale = next((name + s for s in SCALES if name + s in self._owner), None)
            if scale is not None:
                self._scales[name] = self._owner.pop(scale)
        self._stacks = experts_in(self._owner, experts)
        self._num_experts = 0 if experts is None else experts.count

    def __contains__(self, name: str) -> bool:
        is_own = name in self._owner and name not in self._stacks.names
        return is_own or name in self._stacks.parts

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._owner if name not in self._stacks.names)
        yield from self._stacks.parts

    def __len__(self) -> int:
        return len(self._owner) - len(self._stacks.names) + len(self._stacks.parts)

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own.

        Raises:
            InvalidRequestError: There is none of that name.
        """
        if name in self._stacks.parts:
            return self._stacks.read(name, self._expert)
        file, stored = self._place(name)
        # A copy: the result must not keep the file mapped.
        tensor = file.get_tensor(stored).clone()
        return self._scaled(name, tensor) if self._is_float8(name) else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is stored by itself, read from its file's header.

        Raises:
            InvalidRequestError: There is none of that name.
        """
        file, stored = self._place(name)
        return tuple(file.get_slice(stored).get_shape())

    def codes(self) -> list[str]:
        """Names of the tensors that hold bytes, which are codes and not numbers to multiply by."""
        return [
            name
            for name, (file, stored) in self._owner.items()
            if name not in self._stacks.names and file.get_slice(stored).get_dtype() == _BYTES
        ]

    def _is_float8(self, name: str) -> bool:
        file, stored = self._owner[name]
        return name.endswith(_WEIGHT) and file.get_slice(stored).get_dtype() == DTYPE

    def _scaled(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        if name not in self._scales:
            raise InvalidRequestError.of("model", say("SCALE_MISSING", name=name))
        file, stored = self._scales[name]
        try:
            return dequantize_float8(codes, file.get_tensor(stored), self._block)
        except ValueError as error:
            raise InvalidRequestError.of(
                "model", say("TENSOR_INVALID", name=name, problem=error)
            ) from None

    def _expert(self, name: str, expert: int) -> torch.Tensor:
        file, stored = self._place(name)
        stack = file.get_slice(stored)
        found = (stack.get_shape() or [0])[0]
        if found != self._num_experts:
            said = say("EXPERTS_MISMATCH", name=name, found=found, expected=self._num_experts)
            raise InvalidRequestError.of("model", said)
        return stack[expert].clone()

    def _place(self, name: str) -> tuple[safe_open, str]:
        if name not in self._owner:
            raise InvalidRequestError.of("model", say("TENSOR_MISSING", name=name))
        return self._owner[name]


def experts_in(names: Iterable[str], experts: Experts | None) -> ExpertStacks:
    """The stacks of experts among a checkpoint's tensors."""
    if experts is None or not experts.are_stacked:
        return ExpertStacks({}, 0, names)
    folder = f"{experts.checkpoint_path}.experts"
    modules = {
        f"{folder}.{parameter}": f"{folder}.{experts.modules[projection][0]}"
        for projection, parameter in experts.parameters.items()
    }
    return ExpertStacks(modules, experts.count, names)
