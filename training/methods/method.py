"""A training method, and PEFT's methods that change no linear modules."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch

from turret.training.adapter_folder import write_adapter
from turret.training.base_model import TrainingBase, without_peft_warnings
from turret.training.loss import LossFunction
from turret.training.mixture import as_modules
from turret.training.settings.checks import check_modules
from turret.training.settings.config import DECLARED, MethodConfig

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
        computed: Functions of the keys whose defaults are computed. They get the config as far as
            it is filled in, in the order of ``DECLARED``.
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
        adjust: Changes PEFT's model with the adapter, which is its first argument.
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


# Prefix tuning (arXiv 2101.00190), prompt tuning (2104.08691) and p-tuning (2103.10385).
#
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
