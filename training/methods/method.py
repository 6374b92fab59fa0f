"""The interface of a training method, and its implementation for PEFT's methods.

A new method is an object with the members of :class:`TrainingMethod`, in ``METHODS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import peft
import torch

from turret.training.adapter_folder import write_adapter
from turret.training.base_model import TrainingBase, without_peft_warnings
from turret.training.loss import LossFunction
from turret.training.mixture import as_modules
from turret.training.nf4_linear import join_loras
from turret.training.settings.checks import check_modules
from turret.training.settings.config import MethodConfig
from turret.training.settings.declared import DECLARED

# A ``MethodConfig`` in which all keys before the current one are filled in, in the order of the
# method's defaults. Its own types cannot express that these keys are not None.
MethodSettings = Any


class TrainingMethod(Protocol):
    """A training method: it attaches an adapter to the base, and saves the adapter.

    Attributes:
        name: The value of ``method.name``, and the server's name (rsLoRA is served as ``lora``).
        learning_rate: The peak rate if the config sets none.
    """

    @property
    def name(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...

    def resolve(self, config: MethodConfig, base: TrainingBase) -> MethodConfig:
        """Fill in the keys that the config omits.

        Raises:
            ConfigError: A value does not fit the base.
        """
        ...

    def served_rank(self, config: MethodConfig, base: TrainingBase) -> int:
        """The number that a server compares with its ``--max-rank``; 0 if there is none.

        Args:
            config: The result of :meth:`resolve`.
            base: The model's description.
        """
        ...

    def notes(self, config: MethodConfig, base: TrainingBase) -> Sequence[str]:
        """Notes on settings with an unexpected effect on this base.

        Args:
            config: The result of :meth:`resolve`.
            base: The model's description.
        """
        ...

    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        """Add the trainable parameters.

        Args:
            model: The frozen transformers model; changed in place.
            config: The result of :meth:`resolve`.
            base: The model's description.

        Returns:
            A module that is called like the model, and has PEFT's ``get_base_model`` and
            ``disable_adapter``. Its parameters with ``requires_grad`` are the trained ones.
        """
        ...

    def loss(self, model: Any, config: MethodConfig, device: str) -> LossFunction:
        """Create the loss; without gradients, it is the cross entropy.

        Args:
            model: The result of :meth:`attach`.
            config: The result of :meth:`resolve`.
            device: The device of the model.
        """
        ...

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        """Write the adapter in the layout that PEFT and the server read.

        Args:
            model: The result of :meth:`attach`.
            folder: An existing directory.
            dtype: The dtype of the saved tensors.

        Raises:
            RunError: A weight is not finite.
        """
        ...


def fill_in(config: MethodConfig, base: TrainingBase, computed: Mapping[str, Any]) -> MethodConfig:
    """Fill in the keys of the method that the config omits; see ``DECLARED``.

    Args:
        config: The config as read.
        base: The model's description.
        computed: Functions of the keys whose defaults are computed; they get the config as far as
            it is filled in.
    """
    for key, default in DECLARED[config.name].defaults.items():
        if getattr(config, key) is None:
            value = computed[key](config, base) if key in computed else default
            config = dataclasses.replace(config, **{key: value})
    return config


def _no_remarks(config: MethodSettings, base: TrainingBase) -> tuple[str, ...]:
    return ()


def _own_rank(config: MethodSettings, base: TrainingBase) -> int:
    return config.rank or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftMethod:
    """One of PEFT's methods: a function that makes PEFT's config, and computed defaults.

    Attributes:
        peft_config: Makes PEFT's config from the resolved config.
        computed: See ``fill_in``.
        rank_served: Returns ``TrainingMethod.served_rank``; by default the rank, if the method has
            one.
        remarks: Returns ``TrainingMethod.notes``.
    """

    name: str
    peft_config: Callable[[MethodSettings, TrainingBase], peft.PeftConfig]
    computed: Mapping[str, Callable[[MethodSettings, TrainingBase], Any]] = field(
        default_factory=dict
    )
    rank_served: Callable[[MethodSettings, TrainingBase], int] = _own_rank
    remarks: Callable[[MethodSettings, TrainingBase], Sequence[str]] = _no_remarks

    @property
    def learning_rate(self) -> float:
        return DECLARED[self.name].learning_rate

    def resolve(self, config: MethodConfig, base: TrainingBase) -> MethodConfig:
        config = fill_in(config, base, self.computed)
        if config.targets is not None:
            targets = check_modules(self.name, base.arch, config.targets, config.rank)
            config = dataclasses.replace(config, targets=targets)
        return config

    def served_rank(self, config: MethodConfig, base: TrainingBase) -> int:
        return self.rank_served(config, base)

    def notes(self, config: MethodConfig, base: TrainingBase) -> Sequence[str]:
        return self.remarks(config, base)

    def attach(self, model: Any, config: MethodConfig, base: TrainingBase) -> Any:
        with without_peft_warnings(), as_modules(model):
            attached = peft.get_peft_model(model, self.peft_config(config, base))
        join_loras(attached)
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return attached

    def loss(self, model: Any, config: MethodConfig, device: str) -> LossFunction:
        return LossFunction(model, model.get_base_model().get_output_embeddings(), device)

    def save(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        config = model.peft_config["default"].to_dict()
        # PEFT writes the directory of the weights, which is meaningful only on this machine.
        name = model.get_base_model().config._name_or_path
        for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
            if config.get(key) is not None:
                config[key] = name
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        write_adapter(folder, config, state, dtype)


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
