"""The base model for training: the model that the server serves, as a transformers model."""

from __future__ import annotations

import ctypes
import functools
import json
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.autograd.function import once_differentiable
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from turret.kernels.nf4_matmul import MXFP4
from turret.server.log import progress_bar
from turret.server.models.decoding import LAYER_PREFIX, Arch, Projections
from turret.server.models.families import read_arch, text_config, transformers_config
from turret.server.models.model_source import ModelSource, modules_in_16_bits, resolve_model
from turret.server.models.sources.check import default_cache_dir, find_gguf
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import check_model_directory
from turret.server.models.weights.nf4 import Nf4Weight
from turret.training.mixture import load_4bit, put_experts
from turret.training.words import ConfigError, say


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this processor multiplies activations of a dtype.

    In bfloat16, products are slow on Intel processors without AMX: on a Xeon, float32 products ran
    twice as fast as those of AVX512-BF16. On AMX and on AMD processors this has not been measured.
    The dtype depends on the processor alone, because a resumed run must compute the same bits.
    """
    has: Any = torch.cpu.get_capabilities()
    is_intel = str(has.get("cpu_name")).startswith("Intel")
    has_fast_bf16 = has.get("amx_bf16") or (has.get("avx512_bf16") and not is_intel)
    return torch.bfloat16 if dtype == torch.bfloat16 and has_fast_bf16 else torch.float32


def _dtype_of_product(x: torch.Tensor) -> torch.dtype:
    return product_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


class _Product(torch.autograd.Function):
    """``W x`` for every row. Nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenNf4Linear) -> torch.Tensor:
        ctx.linear, dtype = linear, _dtype_of_product(x)
        return (x.to(dtype) @ linear.dequantize(dtype).T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        (grad,), dtype = grads, _dtype_of_product(grads[0])
        return (grad.to(dtype) @ ctx.linear.dequantize(dtype)).to(grad.dtype), None


class FrozenNf4Linear(Linear4bit):
    """A ``Linear4bit`` that dequantises its weight for each product; see ``freeze``."""

    @classmethod
    def freeze(cls, module: Linear4bit) -> None:
        """Make a loaded module a ``FrozenNf4Linear``, and dequantise its absmax values.

        This takes 0.05 bytes of memory per weight, and need not be done again in every product.
        """
        module.__class__ = cls
        weight: Any = module.weight
        state = weight.quant_state
        state.absmax = Nf4Weight(weight.data, state).absmax()
        state.nested, state.offset, state.state2 = False, None, None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, ``[out, in]``."""
        weight: Any = self.weight
        return Nf4Weight(weight.data, weight.quant_state).dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``W x``."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# PEFT uses names that transformers has deprecated. It makes sparse tensors without choosing whether
# to check their indices, which for SHiRA are always valid. And it warns for every module whose OFT
# blocks have another size, which turret reports once in a note.

_DEPRECATED = ("is_gradient_checkpointing", "past_key_values")


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hide the warnings that PEFT causes within the block."""
    with warnings.catch_warnings():
        for name in _DEPRECATED:
            warnings.filterwarnings("ignore", f".*{name}.*", FutureWarning)
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield


def compute_activations_twice(model: Any) -> None:
    """Make a transformers model compute activations again instead of keeping them."""
    # Late 5.x versions of transformers have the first name and deprecate the second.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def without_backward(model: Any) -> Iterator[None]:
    """Run the passes within the block in evaluation mode, without a backward pass.

    If an aLoRA's layers are marked for gradient checkpointing, PEFT prepares every pass for a
    backward pass and rejects the next pass until that has run. So the marks are removed meanwhile.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.eval()
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the system (glibc only).

    A step allocates and frees the same large tensors again and again. By default each of them gets
    new pages, which the system clears first; that took a fifth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory_bytes(device: str) -> int:
    """Peak of the device memory that torch reserved (CUDA), or of the resident memory (CPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def resident_bytes() -> int:
    """Resident memory of this process; its peak if the system does not report the current value."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes("cpu")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


Weights = Literal["nf4", "nf4-dense", "full"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """A base model before its weights are loaded.

    Attributes:
        source: The quantised model that the server serves, with its digest.
        directory: The directory or GGUF file in the config, or an id of the hub; None for the
            bundled model.
        config: transformers' config.
        arch: The server's description of the config.
        tokenizer: transformers' tokenizer.
    """

    source: ModelSource
    directory: Path | None
    config: Any
    arch: Arch
    tokenizer: Any


def check_base(directory: Path | None, check: Callable[[Projections], None]) -> None:
    """Check a model in a directory before it is quantised, which takes minutes.

    Args:
        directory: See :func:`find_base`. GGUF files and models on the hub are not checked.
        check: Called with the modules; raises an error if the model cannot be used.

    Raises:
        InvalidRequestError: The directory is not a model, or its architecture is not supported.
    """
    if directory is not None and directory.is_dir():
        check_model_directory(directory)
        check(read_arch(_config_of(directory)))


def find_base(
    directory: Path | None, check: Callable[[Projections], None] = lambda _: None
) -> TrainingBase:
    """Find (and quantise, the first time) the base model.

    Args:
        directory: The directory or GGUF file in the config, or an id of the hub; None for the
            bundled model.
        check: See :func:`check_base`. It is called for models from other places, too.

    Raises:
        InvalidRequestError: The directory is not a model, or its architecture is not supported.
    """
    check_base(directory, check)
    with progress_bar() as report:
        source = resolve_model(directory, default_cache_dir(), report)
    config = _config_of(source.files)
    arch = read_arch(config)
    check(arch)
    tokenizer = AutoTokenizer.from_pretrained(source.files)
    return TrainingBase(source, directory, config, arch, tokenizer)


def _config_of(files: Path) -> Any:
    """A model's config; for a multimodal model, the config of its language model.

    Raises:
        ConfigError: transformers has no class for the language model alone.
    """
    config = transformers_config(files)
    text = text_config(config)
    if text is config:
        return config
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError.of("base.model", say("NO_TEXT_MODEL", model_type=config.model_type))
    return text


def load_model(base: TrainingBase, weights: Weights, dtype: torch.dtype, device: str) -> Any:
    """Load the frozen model.

    Args:
        base: The result of :func:`find_base`.
        weights: The value of ``base.weights`` in the config.
        dtype: The dtype of activations and of all weights that are not quantised.
        device: ``cpu`` or ``cuda``.

    Returns:
        A ``PreTrainedModel`` without gradients.

    Raises:
        ConfigError: ``weights`` is ``full``, but the base is a mixture of experts, the language
            model of a multimodal checkpoint, a GGUF file other than the bundled one, or a quantised
            checkpoint.
    """
    logging.disable_progress_bar()
    if weights == "full":
        model = _load_full(base, dtype)
    else:
        model = _load_nf4(base, dtype)
        if weights == "nf4-dense":
            _make_dense(model, dtype)
        else:
            for module in _nf4_modules(model).values():
                weight = Nf4Weight(module.weight.data, module.weight.quant_state)
                # bitsandbytes' kernels do not read MXFP4.
                if device == "cpu" or weight.format == MXFP4:
                    FrozenNf4Linear.freeze(module)
    model.config._name_or_path = base.source.name
    return model.to(device).requires_grad_(False)


def empty_model(base: TrainingBase, weights: Weights, dtype: torch.dtype, device: str) -> Any:
    """The model of :func:`load_model` on the meta device: the weights' shapes, without memory."""
    kind = _EmptyFrozen if device == "cpu" else _EmptyLinear4bit
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config, dtype=dtype)
        if base.arch.experts is not None:
            put_experts(model, base.arch, lambda number: _empty_linear)
    if weights == "nf4":
        layers = model.model.layers
        kept = set(modules_in_16_bits(base.source.weights))
        for name, module in list(layers.named_modules()):
            if isinstance(module, torch.nn.Linear) and f"{LAYER_PREFIX}.{name}" not in kept:
                layers.set_submodule(name, kind(module))
        model.is_loaded_in_4bit = True
    model.config._name_or_path = base.source.name
    return model.requires_grad_(False)


def _empty_linear(path: str, out: int, inner: int) -> torch.nn.Module:
    return torch.nn.Linear(inner, out, bias=False)


class _EmptyLinear4bit(Linear4bit):
    """A module that PEFT treats as quantised, although its weight is dense and without memory."""

    def __init__(self, dense: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.compute_dtype = dense.weight.dtype
        weight: Any = dense.weight
        weight.compress_statistics, weight.quant_type = True, "nf4"
        self.weight, self.bias = weight, dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class _EmptyFrozen(_EmptyLinear4bit, FrozenNf4Linear):
    """An ``_EmptyLinear4bit`` for a CPU, where each product dequantises the weight."""

    forward: Any = FrozenNf4Linear.forward

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_like(self.weight, dtype=dtype)


def _load_nf4(base: TrainingBase, dtype: torch.dtype) -> Any:
    model = load_4bit(base.source, base.arch, base.config, dtype)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    # PEFT reads these attributes.
    model.is_loaded_in_4bit = model.is_quantized = True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # Weights that are not quantised have the checkpoint's dtype.
            parameter.data = parameter.data.to(dtype)
    for module in _nf4_modules(model).values():
        # The dtype of weights in the backward pass; the checkpoint's bfloat16 would round again.
        module.weight.quant_state.dtype = dtype
    return model


def _nf4_modules(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def _make_dense(model: Any, dtype: torch.dtype) -> None:
    """Replace the quantised linear modules with plain ones that have the same weights."""
    for name, module in _nf4_modules(model).items():
        dense = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        weight = Nf4Weight(module.weight.data, module.weight.quant_state).dequantize(dtype)
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        dense.bias = module.bias
        model.set_submodule(name, dense)
    # Otherwise PEFT would treat the model as quantised.
    model.is_loaded_in_4bit = False
    model.is_quantized = False
    model.quantization_method = None
    del model.config.quantization_config


def _load_full(base: TrainingBase, dtype: torch.dtype) -> Any:
    if base.arch.experts is not None:
        # Only NF4 models have experts as separate modules.
        raise ConfigError.of("base.weights", say("EXPERTS_NEED_NF4"))
    if base.directory is None:
        found = open_gguf(find_gguf())
        model = AutoModelForCausalLM.from_config(found.config, dtype=torch.bfloat16)
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in found.tensors}
        missing = model.load_state_dict(tensors, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, missing
        return model.to(dtype)
    directory = base.source.files
    if base.directory.suffix == SUFFIX:
        raise ConfigError.of("base.weights", say("GGUF_NEEDS_NF4"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != base.config.model_type:
        raise ConfigError.of("base.weights", say("TEXT_PART_NEEDS_NF4"))
    if config.get("quantization_config") is not None:
        raise ConfigError.of("base.weights", say("WEIGHTS_ARE_QUANTIZED", path=directory))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
