"""For every method: PEFT's config, and random values for its trained tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ALL: dict[str, Any] = {"target_modules": ALL}
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, **_ALL}
_BD_LORA = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    nblocks=2,
)
_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
_CPT: dict[str, Any] = {"cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 4, 4]}

# Method → PEFT's config class and the values of a small adapter, on every supported linear module.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, _LORA),
    "rslora": (peft.LoraConfig, {"r": 6, "lora_alpha": 3, **_ALL, "use_rslora": True}),
    "dora": (peft.LoraConfig, {**_LORA, "use_dora": True}),
    "alora": (peft.LoraConfig, {**_LORA, "alora_invocation_tokens": [7]}),
    "bd_lora": (peft.LoraConfig, {**_LORA, "use_bdlora": _BD_LORA}),
    "kasa": (peft.LoraConfig, {**_LORA, "kasa_config": KasaConfig()}),
    "velora": (peft.LoraConfig, {**_LORA, "velora_config": VeloraConfig(num_groups=4)}),
    "monteclora": (peft.LoraConfig, {**_LORA, "monteclora_config": MontecloraConfig()}),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 5, "lora_alpha": 8, **_ALL, "total_step": 10},
    ),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 5, **_ALL}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3, **_ALL}),
    "ia3": (peft.IA3Config, {**_ALL, "feedforward_modules": ["down_proj"]}),
    "beft": (peft.BeftConfig, _ALL),
    "ln_tuning": (peft.LNTuningConfig, {"target_modules": _NORMS}),
    "vera": (peft.VeraConfig, {"r": 16, **_ALL, "projection_prng_key": 3}),
    "pvera": (peft.PveraConfig, {"r": 16, **_ALL, "projection_prng_key": 3}),
    "vblora": (peft.VBLoRAConfig, {"r": 3, **_ALL, "num_vectors": 16, "vector_length": 16}),
    "unilora": (peft.UniLoraConfig, {"r": 3, **_ALL, "theta_d_length": 64}),
    "tinylora": (peft.TinyLoraConfig, {"r": 2, "u": 8, **_ALL}),
    "delora": (peft.DeloraConfig, {"r": 4, **_ALL}),
    "miss": (peft.MissConfig, {"r": 8, **_ALL}),
    "gralora": (peft.GraloraConfig, {"r": 4, "hybrid_r": 2, "alpha": 4, **_ALL}),
    "hra": (peft.HRAConfig, {"r": 4, **_ALL}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, **_ALL}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, **_ALL}),
    "road": (peft.RoadConfig, {"group_size": 8, **_ALL}),
    "c3a": (peft.C3AConfig, {"block_size": 16, **_ALL}),
    "hira": (peft.HiraConfig, {"r": 4, **_ALL}),
    "deft": (peft.DeftConfig, {"r": 4, **_ALL}),
    "peanut": (peft.PeanutConfig, {"r": 4, "depth": 1, **_ALL}),
    "glora": (peft.GloraConfig, {"r": 4, "config_A_B": "vector", **_ALL}),
    "shira": (peft.ShiraConfig, {"r": 3, **_ALL, "random_seed": 5}),
    "supertuning": (peft.SupertuningConfig, {"sparsity": 0.93, **_ALL}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 90, "scaling": 2.5, **_ALL}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 90, "scaling": 150.0, **_ALL}),
    "randlora": (peft.RandLoraConfig, {"r": 8, "randlora_alpha": 8, **_ALL}),
    "osf": (peft.OSFConfig, _ALL),
    # These layers' weights have more rows than columns, so that V and all U are well conditioned.
    "frod": (
        peft.FrodConfig,
        {"target_modules": ["gate_proj", "up_proj"], "progressbar": False},
    ),
    "poly": (
        peft.PolyConfig,
        {"r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": 2, **_ALL},
    ),
    "multitask_prompt": (
        peft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2},
    ),
    "prefix_tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "cartridge": (peft.CartridgeConfig, {"num_virtual_tokens": 5, "num_frozen_tokens": 2}),
    "adaption_prompt": (peft.AdaptionPromptConfig, {"adapter_len": 5, "adapter_layers": 2}),
    "prompt_tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "cpt": (peft.CPTConfig, {"cpt_token_ids": [9, 8, 7, 6, 5], **_CPT}),
    "trainable_tokens": (peft.TrainableTokensConfig, {"token_indices": [7, 2, 65, 40]}),
    "p_tuning": (
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    ),
}


@dataclass(frozen=True)
class Drawn:
    """One trained tensor to be replaced.

    Attributes:
        old: The tensor as initialised by PEFT.
        noise: Standard normal values of its shape, fp64.
        strength: The strength of the adapter.
    """

    old: torch.Tensor
    noise: torch.Tensor
    strength: float

    @property
    def columns(self) -> int:
        return self.old.shape[-1] or 1

    def around(self, share: float) -> torch.Tensor:
        return self.old * (1.0 + share * self.strength * self.noise)

    def scaled(self, factor: float) -> torch.Tensor:
        return factor * self.noise


def _product(drawn: Drawn, root: float) -> torch.Tensor:
    """Entries of a factor that is multiplied by another one."""
    return drawn.noise * math.sqrt(drawn.strength) / drawn.columns**root


# A part of a parameter's name → its new value; the first match counts.
DRAWS: tuple[tuple[str, Callable[[Drawn], torch.Tensor]], ...] = (
    ("adaption_prompt", lambda d: d.noise),
    ("adaption_gate", lambda d: d.strength * (2.0 + d.noise)),
    ("lora_magnitude_vector", lambda d: d.around(0.6)),
    # The new row contains a part of the old one.
    ("trainable_tokens_delta", lambda d: d.old + d.strength * d.noise * d.old.std()),
    ("modules_to_save", lambda d: d.old + d.strength * d.noise * d.old.std()),
    ("lora_embedding_A", lambda d: d.noise),
    ("lora_embedding_B", lambda d: d.scaled(d.strength / 4)),
    ("ia3_l", lambda d: 1.0 + d.strength * d.noise),
    ("vera_lambda_b", lambda d: d.scaled(d.strength / 4)),
    ("hada_w1_b", lambda d: _product(d, 0.25)),
    ("hada_w2_b", lambda d: _product(d, 0.25)),
    ("beft_bias", lambda d: d.scaled(d.strength)),
    ("bias", lambda d: d.old + 0.3 * d.noise),
    ("prefix_task_", lambda d: d.noise),
    ("poly_router", lambda d: 2.0 * d.noise),
    ("prompt_encoder", lambda d: d.scaled(d.strength)),
    ("lora_E", lambda d: d.noise),
    ("lora_diag", lambda d: d.noise),
    ("vera_lambda_d", lambda d: d.noise),
    ("ln_tuning_layers", lambda d: d.around(1.0)),
    ("vblora_logits", lambda d: d.noise),
    ("vblora_vector_bank", lambda d: d.scaled(math.sqrt(d.strength) / 4)),
    ("unilora_theta_d", lambda d: d.scaled(2.0 * d.strength)),
    ("tinylora_v", lambda d: d.scaled(d.strength)),
    ("delora_lambda", lambda d: 2.0 + d.noise.abs()),
    ("miss_block", lambda d: d.scaled(d.strength / 8)),
    ("hra_u", lambda d: d.noise),
    ("oft_R", lambda d: d.scaled(0.3 * d.strength)),
    ("boft_s", lambda d: 1.0 + 0.6 * d.strength * d.noise),
    ("boft_R", lambda d: d.scaled(d.strength)),
    ("road_alpha", lambda d: 1.0 + 0.6 * d.strength * d.noise),
    ("road_theta", lambda d: d.scaled(d.strength)),
    ("c3a_kernel", lambda d: d.scaled(6.0 * d.strength)),
    ("hira_A", lambda d: d.noise),
    ("hira_B", lambda d: d.scaled(d.strength / d.columns**0.5)),
    ("deft_P", lambda d: d.scaled(0.7 / d.old.shape[0] ** 0.5)),
    ("shira_weight", lambda d: d.scaled(0.7 * d.strength)),
    ("supertuning_values", lambda d: d.scaled(0.7 * d.strength)),
    ("waveft_spectrum", lambda d: d.scaled(d.strength)),
    ("fourierft_spectrum", lambda d: d.scaled(2.0 * d.strength)),
    ("randlora_lambda", lambda d: d.scaled(0.3 * d.strength)),
    ("randlora_gamma", lambda d: d.around(0.5)),
    ("osf_svd_params", lambda d: d.old + 0.3 * d.strength * d.noise * d.old.std()),
    ("frod_lambda_l", lambda d: d.around(1.0)),
    ("frod_lambda_s_values", lambda d: d.scaled(d.strength)),
    ("glora_B", lambda d: d.scaled(0.1 * d.strength)),
    ("glora_", lambda d: d.scaled(0.6 * d.strength / d.columns**0.5)),
    # All other parameters: lora_A, lora_B, lokr_*, hada_*_a and so on.
    ("", lambda d: _product(d, 0.5)),
)


def redraw(name: str, drawn: Drawn) -> torch.Tensor:
    return next(draw(drawn) for part, draw in DRAWS if part in name)
