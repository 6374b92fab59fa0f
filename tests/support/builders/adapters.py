"""Tiny real models, real PEFT checkpoints, and the formula that the operators must satisfy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from builders.methods import make_config, save_adapter
from builders.operators import change_of
from safetensors.torch import load_file, save_file
from said import fields_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.base import (
    BaseModel,
    BaseModule,
    BaseNorm,
    BaseSizes,
    BaseVocabulary,
    ModuleSize,
)
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.component import Component, ComponentRef
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods.check import check_files
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.errors import AdapterCheckpointError

BASE_NAME = "tests/tiny-llama"
VOCAB_SIZE = 97


def tiny_llama(
    *, seed: int = 0, attention_bias: bool = False, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Two layers of hidden size 64: q and o are square, k and v 64 -> 32, gate/up 64 -> 128."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.to(dtype=dtype)  # type: ignore[call-arg]
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers' own initialisation is so small that adapters would have almost no
            # effect.
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5 / parameter.shape[1] ** 0.5)
            elif parameter.ndim == 1 and parameter.shape[0] != 64:
                parameter.normal_(0.0, 0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of the decoder layers, by full path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def base_of(
    model: nn.Module, *, dtype: torch.dtype | None = None, name: str = BASE_NAME
) -> BaseModel:
    """A ``BaseModel`` over plain weights: the served weights are the model's own."""

    def module_of(path: str, linear: nn.Linear) -> BaseModule:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return BaseModule(
            name=path,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=bias,
            dequantize=linear.weight.detach,
        )

    linears = {**linear_modules(model), HEAD: model.get_submodule(HEAD)}
    leaves = {n for n, m in model.named_modules() if n and not list(m.children())}
    served = dtype or next(model.parameters()).dtype
    embedding, head = (model.get_parameter(f"{n}.weight").detach() for n in (EMBEDDING, HEAD))
    return BaseModel(
        name=name,
        model_type="llama",
        digest="0" * 64,
        dtype=served,
        modules={path: module_of(path, linear) for path, linear in linears.items()},
        other_modules=frozenset(leaves - linears.keys()),
        norms=norms_of(model),
        vocabulary=BaseVocabulary(embedding.to(served), head.to(served), is_tied=embedding is head),
        num_layers=2,
        hidden_size=embedding.shape[1],
        num_kv_heads=2,
        head_dim=16,
    )


def norms_of(model: nn.Module) -> dict[str, BaseNorm]:
    """The norms of a Llama by path, with the modules that use their results."""
    feeds = {
        "input_layernorm": [f"self_attn.{name}_proj" for name in "qkv"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    norms = {}
    for name, module in model.named_modules():
        layer, _, leaf = name.rpartition(".")
        weight = getattr(module, "weight", None)
        if leaf in feeds and weight is not None:
            paths = tuple(f"{layer}.{path}" for path in feeds[leaf])
            norms[name] = BaseNorm(weight.detach().float(), 0.0, paths)
    final = model.get_parameter("model.norm.weight").detach().float()
    return {**norms, "model.norm": BaseNorm(final, 0.0, (HEAD,))}


def apply_operators(
    linear: nn.Linear, mix: list[tuple[ModuleOperators, float]], x: torch.Tensor
) -> torch.Tensor:
    """``y = G ⊙ (W x) + b + Σ w Δ(x)``, the formula of ``operators.py``, with dense ΔW."""
    weight = linear.weight.detach().double()
    bias = torch.zeros(()) if linear.bias is None else linear.bias.detach()
    changed = weight + sum(w * change_of(operators, weight) for operators, w in mix)
    biases = [w * operators.bias for operators, w in mix if operators.bias is not None]
    return (x.double() @ changed.T + bias + sum(biases)).to(x.dtype)


class _Adapted(nn.Module):
    def __init__(self, linear: nn.Linear, mix: list[tuple[ModuleOperators, float]]) -> None:
        super().__init__()
        self._linear, self._mix = linear, mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_operators(self._linear, self._mix, x)


def with_operators(model: nn.Module, mix: list[tuple[AdapterOperators, float]]) -> nn.Module:
    """A copy of ``model`` whose linear modules apply a mix of operators."""
    model = copy.deepcopy(model)
    for path, linear in linear_modules(model).items():
        parts = [
            (operators.modules[path], weight)
            for operators, weight in mix
            if path in operators.modules
        ]
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Adapted(linear, parts))
    return model


@torch.no_grad()
def logits(model: nn.Module, seed: int = 7) -> torch.Tensor:
    """Logits of a fixed random batch, ``[2, 9, vocab]``."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, VOCAB_SIZE, (2, 9), generator=generator)
    return model(input_ids=token_ids).logits


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of ``adapter_config.json``; the value ``...`` removes one."""
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(
    directory: Path,
    edit: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor] | None],
) -> None:
    """Rewrite the tensor file with the result of ``edit``, which may also edit in place."""
    path = directory / TENSORS_FILE
    tensors = load_file(path)
    edited = edit(tensors)
    save_file(dict(tensors if edited is None else edited), path)


def make_qalora(directory: Path, group: int) -> None:
    """Convert a saved LoRA to a QA-LoRA, which PEFT creates only on GPTQ layers."""
    edit_config(directory, use_qalora=True, qalora_group_size=group)

    def pool(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor[:, ::group].contiguous() if "lora_A" in name else tensor
            for name, tensor in tensors.items()
        }

    edit_tensors(directory, pool)


def lora_config(**changes: Any) -> Any:
    """The config of a small LoRA, by default on q and v."""
    return make_config(
        "lora", **{"lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **changes}
    )


def read_adapter(root: Path, path: str = "a", max_elements: int = 1 << 24) -> AdapterCheckpoint:
    """Read the adapter directory ``path`` below ``root``."""
    return read_checkpoint(AdapterRoot(root), path, max_elements=max_elements)


def lower_adapter(root: Path, base: BaseModel, path: str = "a") -> Lowered:
    """Read and lower an adapter with its method, and check that a start would accept it."""
    lowered = lower_checkpoint(read_adapter(root, path), base)[1]
    with AdapterRoot(root).open_directory(path) as directory:
        modules = lowered.operators.modules.values()
        blocks = [turned.size for each in modules if (turned := each.get(InputBlocks)) is not None]
        rank = max([0, *lowered.ranks, *blocks])
        check_files(directory, path, base=sizes_of(base), base_name=None, max_rank=rank)
    return lowered


def assert_alike(found: Lowered, expected: Lowered) -> None:
    """Check that two adapters have equal operators, module by module."""
    ours, theirs = found.operators, expected.operators
    assert ours.modules.keys() == theirs.modules.keys()
    pairs: list[tuple[Any, Any]] = [(ours.modules[n], theirs.modules[n]) for n in ours.modules]
    if theirs.soft_prompt is not None:
        pairs.append((ours.soft_prompt, theirs.soft_prompt))
    for one, other in pairs:
        for tensor, wanted in zip(one.tensors(), other.tensors(), strict=True):
            assert torch.equal(tensor, wanted)


def sizes_of(base: BaseModel) -> BaseSizes | None:
    """The sizes of a base that are known at startup; None for a mixture."""
    if base.experts:
        return None
    return BaseSizes(
        name=base.name,
        model_type=base.model_type,
        modules={
            name: ModuleSize(name, module.in_features, module.out_features)
            for name, module in base.modules.items()
            if name != HEAD
        },
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
        kv_width=base.kv_width,
        vocab_size=base.vocabulary.size,
    )


def lower_with_components(
    root: Path, name: str, base: BaseModel, components: Iterable[str]
) -> Lowered:
    """Read and lower an adapter that consists of others below ``root``."""
    by_digest = {read_adapter(root, each).digest: each for each in components}

    def find(ref: ComponentRef) -> Component:
        method, found = lower_checkpoint(read_adapter(root, by_digest[ref.digest]), base)
        return Component(ref, method, found.operators, found.ranks, found.scalings)

    return lower_checkpoint(read_adapter(root, name), base, None, find)[1]


def refusal_of(root: Path, path: str = "a") -> AdapterCheckpointError:
    """The error of reading and lowering on ``tiny_llama``; raises AssertionError without one."""
    try:
        lower_adapter(root, base_of(tiny_llama()), path)
    except AdapterCheckpointError as error:
        return error
    raise AssertionError("the adapter was accepted")


def refused_fields(root: Path, path: str = "a") -> set[str]:
    """The fields that the error of ``refusal_of`` names."""
    return set(fields_of(refusal_of(root, path)))


def save_tiny(root: Path, method: str = "lora", **changes: Any) -> Path:
    """Save an adapter of ``tiny_llama`` as ``a`` below ``root``; returns its directory."""
    save_adapter(tiny_llama(), make_config(method, **changes), root / "a")
    return root / "a"
