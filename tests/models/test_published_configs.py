"""Published sizes: each config is read, and every tensor of its checkpoint has a place.

transformers on the meta device determines the names and shapes of the checkpoint's tensors. The
configs are in ``builders/published_models.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.published_models import PUBLISHED, Published, as_in_a_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from turret.server.models import loader
from turret.server.models.decoding import ROUTER, Arch, Experts, QueryGrowth
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.families import text_config
from turret.server.models.fidelity import Fidelity
from turret.server.models.model_source import ModelSource, experts_in, is_quantized, text_name

META = torch.device("meta")


class MetaTensors:
    """A checkpoint without memory, with the names and shapes of transformers."""

    def __init__(self, state: dict[str, torch.Tensor], experts: Experts | None) -> None:
        self.fidelity = Fidelity()
        self._state = state
        self._stacks = experts_in(state, experts)
        self._parts: dict[str, torch.Tensor] = {}
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._state or name in self._stacks.parts

    def get(self, name: str, *, is_kept: bool = True) -> torch.Tensor:
        self._read.add(name)
        if name in self._stacks.parts:
            # All parts of a stack have the same shape.
            stack, _ = self._stacks.parts[name]
            if stack not in self._parts:
                self._parts[stack] = self._stacks.read(name, lambda s, e: self._state[s][e])
            return self._parts[stack]
        return self._state[name]

    def of_shape(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.get(name)
        assert tuple(tensor.shape) == shape, name
        return tensor

    def weight(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        assert is_quantized(name), name
        tensor = self.get(name)
        assert tuple(tensor.shape) == shape, name
        return tensor

    def packed(self, modules: object) -> None:
        return None

    def head_copy(self) -> None:
        return None

    def plain(self, name: str) -> torch.Tensor:
        assert not is_quantized(name), name
        return self.get(name)

    def unread(self) -> list[str]:
        whole = self._state.keys() - self._stacks.names
        return sorted((whole | self._stacks.parts.keys()) - self._read)


def load_on_meta(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, Any]:
    """The decoder for a config, with every tensor read, and transformers' model."""
    config = AutoConfig.from_pretrained(folder)
    is_text = config is text_config(config)
    with META:
        kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        model = kind.from_config(config)
    tensors = model.state_dict().items()
    state = {name: tensor for key, tensor in tensors if (name := text_name(key)) is not None}
    state = as_in_a_checkpoint(state, config.model_type)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    monkeypatch.setattr(
        loader, "CheckpointTensors", lambda _, experts, **__: MetaTensors(state, experts)
    )
    for linear in ("fuse_weights", "Nf4Experts"):
        monkeypatch.setattr(loader, linear, lambda weights, *_, **__: weights)
    source = ModelSource("", folder, folder, "")
    return loader.load_decoder(source, dtype=torch.bfloat16, device=META), model


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repository)
def test_every_tensor_of_its_checkpoint_has_a_place(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, model = load_on_meta(published.write(tmp_path), monkeypatch)
    arch: Arch = decoder.arch
    if published.num_parameters is not None:
        found = {id(parameter): parameter.numel() for parameter in model.parameters()}
        assert sum(found.values()) == published.num_parameters
    linears = {
        own
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in (own := text_name(path) or "")
    }
    expected = {
        f"model.layers.{number}.{path}"
        for number in range(arch.num_layers)
        for name, slices in arch.linears().items()
        for path, _, _ in slices
        # transformers' routers are a special kind of module.
        if arch.has(number, name) and name != ROUTER
    }
    assert linears == expected
    for parts in arch.ropes.values():
        rotary = parts.inv_freq.shape[0]
        assert 2 * rotary <= arch.head_dim


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("google/gemma-2-27b-it", {"attention_scale": 1 / 12, "windows": 23 * (4096, None)}),
        (
            "google/gemma-3-1b-it",
            {"windows": 4 * (*(512,) * 5, None) + (512, 512), "attention_softcap": None},
        ),
        (
            "ibm-granite/granite-3.3-2b-instruct",
            {"attention_scale": 1 / 64, "logit_scale": 1 / 8},
        ),
        ("allenai/Olmo-3-7B-Instruct", {"windows": 8 * (4096, 4096, 4096, None)}),
        (
            "mistralai/Ministral-3-3B-Instruct-2512",
            {"query_growth": QueryGrowth(0.1, 16384), "windows": 26 * (None,)},
        ),
        ("zai-org/GLM-4-9B-0414", {"is_interleaved": True, "num_kv_heads": 2}),
        ("microsoft/Phi-3.5-mini-instruct", {"long_from": 4096, "max_model_len": 131072}),
        ("microsoft/phi-4", {"long_from": None, "head_dim": 128}),
        ("Qwen/Qwen3-30B-A3B", {"qk_norm": "head", "head_dim": 128, "max_model_len": 40960}),
        (
            "openai/gpt-oss-20b",
            {"windows": 12 * (128, None), "has_sinks": True, "max_model_len": 131072},
        ),
        ("allenai/OLMoE-1B-7B-0924", {"qk_norm": "projection", "windows": 16 * (None,)}),
    ],
)
def test_published_configs_are_read(
    repository: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    (published,) = (model for model in PUBLISHED if model.repository == repository)
    arch = loader.read_arch(AutoConfig.from_pretrained(published.write(tmp_path)))
    assert {name: getattr(arch, name) for name in expected} == expected


def test_partial_rotation_of_heads_is_read(tmp_path: Path) -> None:
    for repository, pairs in (("microsoft/Phi-4-mini-instruct", 48), ("zai-org/GLM-4-9B-0414", 32)):
        (published,) = (model for model in PUBLISHED if model.repository == repository)
        (tmp_path / str(pairs)).mkdir()
        config = AutoConfig.from_pretrained(published.write(tmp_path / str(pairs)))
        (rope,) = loader.read_arch(config).ropes.values()
        assert rope.inv_freq.shape == (pairs,)
