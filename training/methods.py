"""The methods that can be trained: each attaches an adapter to the base, and saves it."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.hra import layer as hra
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import factorization
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.shira import layer as shira

from turret.server.adapters.methods.loha import highest_rank
from turret.server.adapters.methods.oft import dividing
from turret.server.errors import TurretError
from turret.training.adapter_folder import write_adapter
from turret.training.base_model import TrainingBase, without_peft_warnings
from turret.training.examples import invocation_before_answers, invocation_of
from turret.training.fusion import FusionLoss, FusionModel, read_components
from turret.training.loss import LossFunction
from turret.training.lycoris import Nf4LohaLinear, Nf4LokrLinear
from turret.training.mixture import as_modules
from turret.training.settings import DECLARED, MethodConfig
from turret.training.settings.checks import (
    check_modules,
    component_directories,
    expand_targets,
    module_sizes,
)
from turret.training.words import ConfigError, say

# A ``MethodConfig`` in which all keys before the current one are filled in, in the order of the
# method's defaults. Its own types cannot express that these keys are not None.
MethodSettings = Any


def _own_rank(config: MethodSettings, base: TrainingBase) -> int:
    return config.rank or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMethod(ABC):
    """A training method: it attaches an adapter to the base, and saves the adapter.

    All methods and functions but ``resolve`` get the config that ``resolve`` returns.

    Attributes:
        name: The value of ``method.name``, and the server's name (rsLoRA is served as ``lora``).
        computed: By key, functions that compute the default. They get the config as far as it is
            filled in, in the order of ``DECLARED``.
        served_rank: Returns the number that a server compares with its ``--max-rank``; 0 if there
            is none.
        notes: Returns notes on settings with an unexpected effect on this base.
    """

    name: str
    computed: Mapping[str, Callable[[MethodSettings, TrainingBase], Any]] = field(
        default_factory=dict
    )
    served_rank: Callable[[MethodSettings, TrainingBase], int] = _own_rank
    notes: Callable[[MethodSettings, TrainingBase], Sequence[str]] = lambda config, base: ()

    @property
    def learning_rate(self) -> float:
        """The peak rate if the config sets none."""
        return DECLARED[self.name].learning_rate

    def resolve(self, config: MethodConfig, base: TrainingBase) -> MethodConfig:
        """Fill in the keys that the config omits.

        Raises:
            ConfigError: A value does not fit the base.
        """
        for key, default in DECLARED[self.name].defaults.items():
            if getattr(config, key) is None:
                compute = self.computed.get(key)
                value = default if compute is None else compute(config, base)
                config = dataclasses.replace(config, **{key: value})
        if config.targets is not None:
            targets = check_modules(self.name, base.arch, config.targets, config.rank)
            config = dataclasses.replace(config, targets=targets)
        return config

    @abstractmethod
    def attach(self, model: Any, config: MethodSettings, base: TrainingBase) -> Any:
        """Add the trainable parameters.

        Args:
            model: The frozen transformers model; changed in place.
            config: The config.
            base: The model's description.

        Returns:
            A module that is called like the model, and has PEFT's ``get_base_model`` and
            ``disable_adapter``. Its parameters with ``requires_grad`` are the trained ones.
        """

    def loss(self, model: Any, config: MethodSettings, device: str) -> LossFunction:
        """Create the loss of an attached model; without gradients, it is the cross entropy."""
        return LossFunction(model, model.get_base_model().get_output_embeddings(), device)

    @abstractmethod
    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        """Write the adapter in the layout that PEFT and the server read.

        Args:
            model: The attached model.
            folder: An existing directory.
            dtype: The dtype of the saved tensors.

        Raises:
            RunError: A weight is not finite.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftMethod(TrainingMethod):
    """One of PEFT's methods.

    Attributes:
        peft_config: Makes PEFT's config.
        adjust: Changes PEFT's model with the adapter, its first argument. The second is the model
            to which the adapter was attached.
    """

    peft_config: Callable[[MethodSettings, TrainingBase], peft.PeftConfig]
    adjust: Callable[[Any, Any], None] = lambda attached, model: None

    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        with without_peft_warnings(), as_modules(model):
            attached = peft.get_peft_model(model, self.peft_config(config, base))
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.adjust(attached, model)
        return attached

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        config = model.peft_config["default"].to_dict()
        # PEFT writes the directory of the weights, which is meaningful only on this machine.
        name = model.get_base_model().config._name_or_path
        for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
            if config.get(key) is not None:
                config[key] = name
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        write_adapter(folder, config, state, dtype)


def linear_config(
    kind: Any, keys: Mapping[str, str], **fixed: Any
) -> Callable[[MethodSettings, TrainingBase], peft.PeftConfig]:
    """A function that makes PEFT's config of a method that changes linear modules.

    Args:
        kind: The class of the config.
        keys: Its keys → those of ``MethodConfig``.
        fixed: The values of other keys.
    """

    def make(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
        values = {name: getattr(config, key) for name, key in keys.items()}
        targets = list(config.targets)
        return kind(task_type="CAUSAL_LM", target_modules=targets, **values, **fixed)

    return make


# The networks of prefix tuning and p-tuning are evaluated when the adapter is saved, so the server
# gets only the resulting prefix or prompt.


def _hidden_size(config: MethodSettings, base: TrainingBase) -> int:
    return base.arch.hidden_size


def _prefix_width(config: MethodSettings, base: TrainingBase) -> int | None:
    return base.arch.num_kv_heads * base.arch.head_dim if config.prefix_projection else None


def _prefix_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    arch = base.arch
    return peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        encoder_hidden_size=config.encoder_hidden_size,
        # Pass these sizes, because PEFT would derive them from hidden_size, which is wrong for a
        # model with a separate head_dim.
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_kv_heads,
        token_dim=arch.num_kv_heads * arch.head_dim,
    )


def _prompt_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    is_text = config.init_text is not None
    return peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_tuning_init="TEXT" if is_text else "RANDOM",
        prompt_tuning_init_text=config.init_text,
        tokenizer_name_or_path=str(base.source.files) if is_text else None,
    )


def _p_tuning_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_dropout=config.dropout,
    )


PREFIX_TUNING = PeftMethod(
    name="prefix_tuning",
    peft_config=_prefix_config,
    computed={"encoder_hidden_size": _prefix_width},
)
PROMPT_TUNING = PeftMethod(name="prompt_tuning", peft_config=_prompt_config)
P_TUNING = PeftMethod(
    name="p_tuning", peft_config=_p_tuning_config, computed={"encoder_hidden_size": _hidden_size}
)


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


def _ia3_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    # The paper scales the feed-forward's inner activations: the input of the last product.
    scaled = [name for name in config.targets if name == "down_proj"]
    return linear_config(peft.IA3Config, {}, feedforward_modules=scaled)(config, base)


def _keep_dtype(attached: Any, model: Any) -> None:
    """Convert PEFT's float32 outputs to the model's dtype: attention does not mix dtypes."""
    dtype = model.dtype
    for module in attached.modules():
        if isinstance(module, IA3Layer) and isinstance(module, torch.nn.Module):
            module.register_forward_hook(lambda module, inputs, out: out.to(dtype))


IA3 = PeftMethod(name="ia3", peft_config=_ia3_config, adjust=_keep_dtype)


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


# PEFT's layer for HRA multiplies the base's weight by a matrix of the reflections, which does not
# work with a packed weight. It also keeps an ``in × in`` matrix for each reflection until the
# backward pass, which takes gigabytes even for the smallest model. The layer here reflects the
# input instead. Everything else is PEFT's.


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


_MISS_KEYS = {"r": "rank", "miss_dropout": "dropout"}
MISS = PeftMethod(name="miss", peft_config=linear_config(peft.MissConfig, _MISS_KEYS))


# PEFT's default; smaller if the base's dimensions are not divisible by it.
_VECTOR_LENGTH = 256


def _vblora_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    sizes = [size for _, *both in module_sizes(base.arch, config.targets) for size in both]
    keys = {"r": "rank", "vblora_dropout": "dropout"}
    length = math.gcd(_VECTOR_LENGTH, *sizes)
    return linear_config(peft.VBLoRAConfig, keys, vector_length=length)(config, base)


VBLORA = PeftMethod(name="vblora", peft_config=_vblora_config)


def _shira_config(config: MethodSettings, base: TrainingBase) -> peft.PeftConfig:
    # The draw depends on the run's seed, which is set before a method is attached.
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


class LearnedFusionMethod(TrainingMethod):
    def attach(self, model: Any, config: MethodSettings, base: TrainingBase) -> Any:
        try:
            components = read_components(component_directories(config.components), model)
        except TurretError as error:
            why = say("INVALID", why=error.message)
            raise ConfigError.of("method.components", why) from error
        return FusionModel(model, components, config.d_k)

    def loss(self, model: Any, config: MethodSettings, device: str) -> LossFunction:
        head = model.get_base_model().get_output_embeddings()
        return FusionLoss(model, head, device, config.guidance)

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        name = model.get_base_model().config._name_or_path
        config = {**model.fusion_config(), "base_model_name_or_path": name}
        write_adapter(folder, config, model.fusion_state(), dtype)


LEARNED_FUSION = LearnedFusionMethod(
    name="learned_fusion", served_rank=lambda config, base: config.d_k
)


# PEFT takes the first entry that fits, and a Linear4bit is also a torch.nn.Linear, so Linear4bit
# must come first.
LoHaModel.layers_mapping = {Linear4bit: Nf4LohaLinear, **LoHaModel.layers_mapping}
LoKrModel.layers_mapping = {Linear4bit: Nf4LokrLinear, **LoKrModel.layers_mapping}

_LOHA_RANK = 8


def _rank_as_alpha(config: MethodSettings, base: TrainingBase) -> float:
    return float(config.rank)


def _loha_rank(config: MethodSettings, base: TrainingBase) -> int:
    sizes = module_sizes(base.arch, expand_targets(base.arch, config.targets))
    return max(1, min(_LOHA_RANK, *(highest_rank(inner, out) for _, out, inner in sizes)))


_LOHA_KEYS = {"r": "rank", "alpha": "alpha", "rank_dropout": "dropout"}
_LOKR_KEYS = {
    **_LOHA_KEYS,
    "decompose_both": "decompose_both",
    "decompose_factor": "decompose_factor",
}


def _decomposed_rank(config: MethodSettings, base: TrainingBase) -> int:
    """The rank to serve; 0 if PEFT decomposes no factor, so that the rank only divides alpha."""
    for _, *sides in module_sizes(base.arch, config.targets):
        if config.rank < max(factorization(side, config.decompose_factor)[1] for side in sides) / 2:
            return config.rank
    return 0


LOHA = PeftMethod(
    name="loha",
    peft_config=linear_config(peft.LoHaConfig, _LOHA_KEYS),
    computed={"rank": _loha_rank, "alpha": _rank_as_alpha},
)
LOKR = PeftMethod(
    name="lokr",
    peft_config=linear_config(peft.LoKrConfig, _LOKR_KEYS),
    computed={"alpha": _rank_as_alpha},
    served_rank=_decomposed_rank,
)


# The methods by their names in the config.
METHODS: Mapping[str, TrainingMethod] = {
    method.name: method
    for method in (
        *(LORA, RSLORA, DORA, ALORA, MISS, OFT, HRA, VBLORA, SHIRA),
        *(LOHA, LOKR, IA3, PREFIX_TUNING, PROMPT_TUNING, P_TUNING, LEARNED_FUSION),
    )
}
