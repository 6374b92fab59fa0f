"""Trainable mixtures of experts, in which every expert's projections are linear modules.

transformers stores the experts of a layer as parameters of three dimensions. bitsandbytes does not
quantise these, and PEFT adapts them in a special form. Here, as in the checkpoint and on the
server, each expert consists of separate modules in NF4. A LoRA on them has a module per expert,
which is the older of the two forms that PEFT and the server read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from turret.kernels.rows import clamped_swiglu_reference
from turret.server.models.decoding import LAYER_PREFIX, ROUTER, Arch, ClampedSwiglu
from turret.server.models.loader import CheckpointTensors
from turret.server.models.model_source import ModelSource

# (path below the layer, out_features, in_features) -> module.
MakeLinear = Callable[[str, int, int], torch.nn.Module]


class ExpertModules(torch.nn.Module):
    """A replacement for transformers' experts, with the same arguments and results.

    Args:
        arch: An architecture with experts.
        make: Creates each linear module.
    """

    def __init__(self, arch: Arch, make: MakeLinear) -> None:
        super().__init__()
        experts = arch.experts
        assert experts is not None
        self._experts = experts
        self._activation = arch.activation
        for projection, (_, out, inner) in arch.expert_linears().items():
            names = experts.modules[projection]
            for name in (name.format(e) for e in range(experts.count) for name in names):
                path = f"{experts.checkpoint_path}.experts.{name}"
                _put(self, name, make(path, out // len(names), inner))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: ``[tokens, hidden]``, or with a leading batch dimension.
            top_k_index: The experts of each token, ``[tokens, k]``.
            top_k_weights: The weights of these experts.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(x)
        # The pairs of a token and one of its experts, sorted by expert.
        pairs = top_k_index.flatten().argsort(stable=True)
        of_expert = pairs.split(self._counts(top_k_index))
        for expert, own in enumerate(of_expert):
            if len(own):
                rows = own // top_k_index.shape[1]
                found = self._one(expert, x[rows]) * top_k_weights.flatten()[own, None]
                total = total.index_add(0, rows, found.to(total.dtype))
        return total.reshape(hidden_states.shape)

    def _counts(self, chosen: torch.Tensor) -> list[int]:
        """The number of tokens of each expert; the only wait for the device in a layer."""
        count = self._experts.count
        if chosen.is_meta:
            # Only the shapes matter: assume that the tokens are spread evenly.
            share, rest = divmod(chosen.numel(), count)
            return [share + (expert < rest) for expert in range(count)]
        numbers = torch.arange(count, device=chosen.device)
        return (chosen.flatten() == numbers[:, None]).sum(1).tolist()

    def _one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        modules, activation = self._experts.modules, self._activation
        parts = [self.get_submodule(n.format(expert))(x) for n in modules["experts_gate_up"]]
        if isinstance(activation, ClampedSwiglu):
            hidden = clamped_swiglu_reference(parts[0], activation.alpha, activation.limit)
        else:
            gate, up = parts
            hidden = ACT2FN[activation](gate) * up
        (down,) = modules["experts_down"]
        return self.get_submodule(down.format(expert))(hidden)


def put_experts(model: Any, arch: Arch, make: Callable[[int], MakeLinear]) -> None:
    """Replace a model's experts with modules, layer by layer."""
    assert arch.experts is not None
    for number, layer in enumerate(model.model.layers):
        if arch.has(number, ROUTER):
            layer.set_submodule(f"{arch.experts.path}.experts", ExpertModules(arch, make(number)))


@contextmanager
def as_modules(model: Any) -> Iterator[None]:
    """Make PEFT use the modules of experts while an adapter is attached.

    Because of ``model_type``, PEFT would otherwise map them to transformers' parameters.
    """
    config = model.config
    kind = config.model_type
    if any(isinstance(module, ExpertModules) for module in model.modules()):
        config.model_type = f"{kind}_of_modules"
    try:
        yield
    finally:
        config.model_type = kind


def load_4bit(source: ModelSource, arch: Arch, config: Any, dtype: torch.dtype) -> Any:
    """A transformers model of the weights that the server serves, with its experts as modules.

    Args:
        source: The 4-bit weights, which may be those of a larger model that contains this one.
        arch: The architecture of the model.
        config: transformers' config.
        dtype: The dtype in which 4-bit modules compute, and that of biases and 16-bit modules.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        # The released checkpoint's quantisation does not apply to these modules.
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = CheckpointTensors(source, arch.experts)

    def make(number: int) -> MakeLinear:
        prefix = f"{LAYER_PREFIX}.{number}"
        return lambda path, out, inner: _linear(tensors, f"{prefix}.{path}", out, inner, dtype)

    if arch.experts is not None:
        put_experts(model, arch, make)
    for number, layer in enumerate(model.model.layers):
        for path, module in list(layer.named_modules()):
            # Experts in 16 bits have their weights already.
            if type(module) is torch.nn.Linear and module.weight.is_meta:
                linear = make(number)(path, module.out_features, module.in_features)
                layer.set_submodule(path, linear)
    _load_rest(model, tensors, arch)
    return model


def _load_rest(model: Any, tensors: CheckpointTensors, arch: Arch) -> None:
    """Load the parameters that have no memory yet: norms, embeddings and routers."""
    for name, parameter in list(model.named_parameters()):
        stored = _stored_name(name, tensors, arch)
        if not parameter.is_meta or not tensors.has(stored):
            continue
        tensor = tensors.plain(stored) if stored.endswith(".weight") else tensors.get(stored)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if not tensors.has("lm_head.weight"):
        model.lm_head.weight = model.model.embed_tokens.weight
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not lacking, f"the server would have refused a checkpoint without {lacking[0]}"


def _stored_name(name: str, tensors: CheckpointTensors, arch: Arch) -> str:
    """The checkpoint's name for a parameter of the model."""
    experts = arch.experts
    if experts is None:
        return name
    for router in (experts.router, *experts.checkpoint_routers):
        own, theirs = f".{experts.path}.{experts.router}.", f".{experts.checkpoint_path}.{router}."
        if own in name and tensors.has(name.replace(own, theirs)):
            return name.replace(own, theirs)
    return name


def _linear(
    tensors: CheckpointTensors, name: str, out: int, inner: int, dtype: torch.dtype
) -> torch.nn.Linear:
    weight = tensors.weight(f"{name}.weight", (out, inner))
    module: torch.nn.Linear
    if isinstance(weight, torch.Tensor):
        module = torch.nn.Linear(inner, out, bias=False, device="meta")
        module.weight = torch.nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    else:
        module = Linear4bit(inner, out, bias=False, compute_dtype=dtype, device="meta")
        stats = weight.state.as_dict(packed=True)
        packed, like = weight.packed, {"device": "cpu", "module": module}
        module.weight = Params4bit.from_prequantized(packed, stats, **like)
    if tensors.has(f"{name}.bias"):
        bias = tensors.of_shape(f"{name}.bias", out).to(dtype)
        module.bias = torch.nn.Parameter(bias, requires_grad=False)
    return module


def _put(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    """Add a module at a path; missing modules above it are created."""
    *folders, leaf = path.split(".")
    for folder in folders:
        if folder not in dict(root.named_children()):
            root.add_module(folder, torch.nn.Module())
        root = root.get_submodule(folder)
    root.add_module(leaf, module)
