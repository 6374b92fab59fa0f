"""Methods that change linear modules."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.hra import layer as hra
from peft.tuners.ia3 import IA3Layer
from peft.tuners.shira import layer as shira

from turret.server.adapters.methods.oft import dividing
from turret.training.base_model import TrainingBase
from turret.training.examples import invocation_before_answers, invocation_of
from turret.training.methods.method import MethodSettings, PeftMethod, linear_config
from turret.training.settings.checks import module_sizes

# LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353).


def _twice_rank(config: MethodSettings, base: TrainingBase) -> float:
    return 2.0 * config.rank


_LORA_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
LORA = PeftMethod(
    name="lora",
    peft_config=linear_config(peft.LoraConfig, _LORA_KEYS),
    computed={"alpha": _twice_rank},
)
RSLORA = PeftMethod(
    name="rslora", peft_config=linear_config(peft.LoraConfig, _LORA_KEYS, use_rslora=True)
)
DORA = PeftMethod(
    name="dora",
    peft_config=linear_config(peft.LoraConfig, _LORA_KEYS, use_dora=True),
    computed={"alpha": _twice_rank},
)


# aLoRA (arXiv 2504.12397): a LoRA that takes effect at its invocation in the prompt. The base
# computes the tokens before it, so their keys and values are shared with all other requests.


def _written_by_the_template(config: MethodSettings, base: TrainingBase) -> str:
    return invocation_before_answers(base.tokenizer)


def _alora_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    tokens = list(invocation_of(base.tokenizer, config.invocation).tokens)
    make = linear_config(peft.LoraConfig, _LORA_KEYS, alora_invocation_tokens=tokens)
    return make(config, base)


ALORA = PeftMethod(
    name="alora",
    peft_config=_alora_config,
    computed={"alpha": _twice_rank, "invocation": _written_by_the_template},
)


# IA3 (arXiv 2205.05638): one learned factor per output, or per input of the feed-forward.


def _ia3_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    # The paper scales the feed-forward's inner activations: the input of the last product.
    scaled = [name for name in config.targets if name == "down_proj"]
    return linear_config(peft.IA3Config, {}, feedforward_modules=scaled)(config, base)


def _keep_dtype(attached: Any, model: Any) -> None:
    """Convert PEFT's float32 outputs back, because attention does not mix dtypes."""
    dtype = model.dtype
    for module in attached.modules():
        if isinstance(module, IA3Layer) and isinstance(module, torch.nn.Module):
            module.register_forward_hook(lambda module, inputs, out: out.to(dtype))


IA3 = PeftMethod(name="ia3", peft_config=_ia3_config, adjust=_keep_dtype)


# OFT (arXiv 2306.07280): blocks of the input are rotated before the base layer.


def _oft_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    # Blocks of b inputs cost as much as a LoRA of rank b / 2.
    size = 2 * config.rank
    keys = {"module_dropout": "dropout"}
    return linear_config(peft.OFTConfig, keys, oft_block_size=size)(config, base)


def _largest_block(config: MethodSettings, base: TrainingBase) -> int:
    sizes = module_sizes(base.arch, config.targets)
    return max(dividing(inner, 2 * config.rank) for _, _, inner in sizes)


def _other_blocks(config: MethodSettings, base: TrainingBase) -> tuple[str, ...]:
    """A note if a module's inputs cannot be divided into blocks of the requested size."""
    wanted = 2 * config.rank
    widths = sorted({inner for _, _, inner in module_sizes(base.arch, config.targets)})
    made = [f"{dividing(width, wanted)} of {width}" for width in widths if width % wanted]
    if not made:
        return ()
    return (
        f"method.rank {config.rank} asks for blocks of {wanted} inputs, which do not divide all"
        f" modules; the nearest that do are trained: {', '.join(made)}",
    )


OFT = PeftMethod(
    name="oft",
    peft_config=_oft_config,
    served_rank=_largest_block,
    notes=_other_blocks,
)


# HRA (arXiv 2405.17484): the input is reflected at learned planes, one after another.
#
# PEFT's layer multiplies the base's weight by a matrix of the reflections, which does not work with
# a packed weight. It also keeps an ``in × in`` matrix for each reflection until the backward pass,
# which takes gigabytes even for the smallest model. The layer here reflects the input instead.
# Everything else is PEFT's.


class ReflectedLinear(hra.HRALinear):
    """A linear module, packed or not, with an HRA adapter on it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``W R x + b``; ``[..., in]`` → ``[..., out]``, in the dtype of ``x``."""
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.hra_u:
                    x = reflect(x, self.hra_u[name])
        return self.base_layer(x, *args, **kwargs)


def reflect(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``R x`` with ``R = Π (I − 2 v_i v_iᵀ)``, ``v_i`` the columns of ``u`` at length 1.

    Computed as ``I − V T Vᵀ``, where ``T⁻¹`` is the upper triangle of ``Vᵀ V`` with halves on its
    diagonal (the compact WY form: Schreiber, Van Loan 1989; Joffrain et al. 2006).

    Args:
        x: ``[..., in]``, any float dtype.
        u: ``[in, r]`` fp32, no column of zeros.

    Returns:
        ``[..., in]`` in the dtype of ``x``; computed in that of ``u``.
    """
    v = u / u.norm(dim=0)
    overlaps = (v.T @ v).triu(1)
    triangle = overlaps + 0.5 * torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    flat = x.to(v.dtype).flatten(0, -2)
    shares = torch.linalg.solve_triangular(triangle, (flat @ v).T, upper=True)
    return (flat - shares.T @ v.T).view(x.shape).to(x.dtype)


def _reflect_inputs(attached: Any, model: Any) -> None:
    for layer in attached.modules():
        if isinstance(layer, hra.HRALinear):
            layer.__class__ = ReflectedLinear


HRA = PeftMethod(
    name="hra",
    peft_config=linear_config(peft.HRAConfig, {"r": "rank"}),
    adjust=_reflect_inputs,
)


# MiSS (arXiv 2409.15371): one matrix per module, which all pieces of the input share.


_MISS_KEYS = {"r": "rank", "miss_dropout": "dropout"}
MISS = PeftMethod(name="miss", peft_config=linear_config(peft.MissConfig, _MISS_KEYS))


# VB-LoRA (arXiv 2405.15179): both factors are composed of vectors from a bank that modules share.

# PEFT's default; smaller if the base's dimensions are not divisible by it.
_VECTOR_LENGTH = 256


def _vblora_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    sizes = [size for _, *both in module_sizes(base.arch, config.targets) for size in both]
    keys = {"r": "rank", "vblora_dropout": "dropout"}
    length = math.gcd(_VECTOR_LENGTH, *sizes)
    return linear_config(peft.VBLoRAConfig, keys, vector_length=length)(config, base)


VBLORA = PeftMethod(name="vblora", peft_config=_vblora_config)


# SHiRA (arXiv 2406.13175): a few entries of each weight, at random positions, are trained.


def _shira_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    # The run's seed is set before a method is attached.
    seed = int(torch.randint(1 << 31, ()))
    made: Any = linear_config(peft.ShiraConfig, {"r": "rank"}, random_seed=seed)(config, base)
    made.mask_fn = _MaskDrawer(seed)
    return made


class _MaskDrawer:
    """PEFT's ``random_mask``, but always on the CPU and only once per shape.

    In PEFT, too, modules of the same shape get the same positions. Permuting the entries of a large
    weight takes seconds.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._places: dict[tuple[int, int, int], torch.Tensor] = {}

    def __call__(
        self, base_layer: Any, r: int, random_seed: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        out, inner = base_layer.out_features, base_layer.in_features
        key = (out, inner, r)
        if key not in self._places:
            drawn = torch.randperm(out * inner, generator=torch.Generator().manual_seed(self._seed))
            # Copy the part, because a view would keep the whole tensor.
            self._places[key] = drawn[: r * (out + inner)].clone()
        mask = torch.zeros(out * inner, dtype=torch.bool)
        mask[self._places[key]] = True
        return mask.view(out, inner)


def _use_shapes(attached: Any, model: Any) -> None:
    """Let SHiRA's layers work on the meta device, which has no sparse or packed weights."""
    for layer in attached.modules() if model.device.type == "meta" else ():
        if isinstance(layer, shira.Linear):
            layer.quantization_backend = None
            layer.get_delta_weight = partial(_delta_shape, layer)


def _delta_shape(layer: shira.Linear, adapter: str) -> torch.Tensor:
    """A tensor with the weight's shape and the values' gradient, but only the values' memory."""
    return layer.shira_weight[adapter].sum().expand(layer.out_features, layer.in_features)


SHIRA = PeftMethod(
    name="shira",
    peft_config=_shira_config,
    adjust=_use_shapes,
    # SHiRA's rank only sets the number of trained entries; serving needs no rank for it.
    served_rank=lambda config, base: 0,
)
