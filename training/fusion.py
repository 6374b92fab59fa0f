"""A learned fusion: its frozen components, its layers and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.checkpoint import PEFT_PREFIX
from turret.server.adapters.component import Component, ComponentRef
from turret.server.adapters.lowering import check_fusable, update_of
from turret.server.adapters.methods.learned_fusion import METHOD as LEARNED_FUSION
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.low_rank import LowRank
from turret.training.adapter_folder import read_adapter
from turret.training.batches import IGNORED, TrainingBatch
from turret.training.loss import LossFunction
from turret.training.settings.checks import component_directories


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a transformers model's decoder layers, by full path, in its order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def component_digests(entries: Sequence[str]) -> dict[str, str]:
    """Component names → digests of the current files in their directories."""
    directories = component_directories(entries)
    return {name: adapter_digest(directory) for name, directory in directories.items()}


def adapter_digest(directory: Path) -> str:
    """The digest of an adapter's files, which a server reports for them."""
    return read_adapter(directory).digest


def read_components(directories: Mapping[str, Path], model: nn.Module) -> list[Component]:
    """Reads adapter directories for a transformers model.

    Args:
        directories: The components' names → directories, in the fusion's order.
        model: The base, whose module names and sizes the adapters must fit.

    Raises:
        TurretError: A directory is not an adapter that fits the model, or cannot be fused.
    """
    base = _describe(model)
    components = []
    for name, directory in directories.items():
        checkpoint = read_adapter(directory)
        method, lowered = lower_checkpoint(checkpoint, base)
        ref = ComponentRef(name, checkpoint.digest)
        components.append(Component(ref, method, lowered.operators, lowered.ranks))
    check_fusable(components, ", ".join(directories))
    return components


def _describe(model: Any) -> BaseModel:
    """Describe the base, as far as this is needed for reading low-rank adapters."""
    linears = linear_modules(model)
    leaves = {name for name, module in model.named_modules() if name and not [*module.children()]}
    config = model.config
    return BaseModel(
        name="",
        model_type=config.model_type,
        digest="",
        dtype=torch.float32,
        modules={
            name: BaseModule(
                name,
                linear.in_features,
                linear.out_features,
                bias=linear.bias,
                dequantize=_weight_of(linear),
            )
            for name, linear in linears.items()
        },
        other_modules=frozenset(leaves - linears.keys()),
        vocabulary=BaseVocabulary(
            model.get_input_embeddings().weight.detach(),
            model.get_output_embeddings().weight.detach(),
            is_tied=bool(config.tie_word_embeddings),
        ),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
    )


def _weight_of(module: Any) -> Callable[[], torch.Tensor]:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return lambda: module.weight.detach().float()
    return lambda: dequantize_4bit(module.weight.data, state).float()


# AdapterFusion (arXiv 2005.00247, section 3.2) in rank space, as the server computes it
# (``kernels/fusion_gate.py``), with gradients for the query and the key alone::
#
#     v_k = A_k x        α = softmax_k((Wq x) · (Wk B_k) v_k)        y = W x + b + Σ_k α_k B_k v_k


class FusionLayer(nn.Module):
    """A frozen linear module, with updates that a trained gate weighs. Called like that module.

    The key starts at zero and the query at random, so that training starts from the mean of the
    components. With two zeros, neither would ever get a gradient.

    Args:
        base: A linear module, which may be quantised.
        updates: The components' updates in order; None for a component that does not adapt the
            module. At least one is not None.
        d_k: Width of queries and keys.

    Attributes:
        query: ``Wq``, ``[d_k, in]`` fp32.
        key: ``Wk``, ``[d_k, out]`` fp32.
        is_enabled: Whether the fusion is applied; otherwise the result is the base's.
        alone: Number of the component whose update is added without a gate, or None.
        log_gates: A list to which every call appends ``log α``, ``[…, components]``; or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    members: torch.Tensor

    def __init__(self, base: nn.Linear, updates: Sequence[LowRank | None], d_k: int) -> None:
        super().__init__()
        self.base = base
        self.is_enabled = True
        self.alone: int | None = None
        self.log_gates: list[torch.Tensor] | None = None
        held = [update for update in updates if update is not None]
        self.register_buffer("a", torch.cat([each.a for each in held]).float(), persistent=False)
        self.register_buffer("b", torch.cat([each.b for each in held]).float(), persistent=False)
        # [components, ranks]: 1 for the ranks of each component.
        ranks = [0 if update is None else len(update.a) for update in updates]
        owners = [k for k, rank in enumerate(ranks) for _ in range(rank)]
        members = torch.tensor([[float(k == owner) for owner in owners] for k in range(len(ranks))])
        self.register_buffer("members", members, persistent=False)
        self.query = nn.Parameter(torch.randn(d_k, base.in_features) / base.in_features**0.5)
        self.key = nn.Parameter(torch.zeros(d_k, base.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, in]`` → ``[…, out]`` in the dtype of the base's result."""
        y = self.base(x)
        if not self.is_enabled:
            return y
        wide = x.to(self.a.dtype)
        v = wide @ self.a.T
        if self.alone is not None:
            return y + (self.members[self.alone] * v @ self.b).to(y.dtype)
        # Run the same operations with and without a listener, because gradient checkpointing runs
        # the layer again without one.
        log_gates = self.scores(wide, v).log_softmax(-1)
        if self.log_gates is not None:
            self.log_gates.append(log_gates)
        return y + ((log_gates.exp() @ self.members) * v @ self.b).to(y.dtype)

    def scores(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``(Wq x) · (Wk B_k) v_k``, ``[…, components]``, of inputs and their rank activations."""
        keys = self.b @ self.key.T
        return (x @ self.query.T @ keys.T * v) @ self.members.T


class FusionModel(nn.Module):
    """A model in which fusion layers replace the modules that the components adapt.

    It is called like the model; only queries and keys have gradients.

    Args:
        model: A transformers model; frozen and changed in place.
        components: The result of ``read_components``.
        d_k: Width of queries and keys.
    """

    def __init__(self, model: Any, components: Sequence[Component], d_k: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.components = tuple(components)
        self.d_k = d_k
        # Keyed by module path; the layers are registered in the model, not here.
        self.layers: dict[str, FusionLayer] = {}
        for path, linear in linear_modules(model).items():
            updates = [update_of(component, path) for component in components]
            if any(update is not None for update in updates):
                layer = FusionLayer(linear, updates, d_k)
                model.set_submodule(path, layer)
                self.layers[path] = layer

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.model(*args, **keywords)

    def get_base_model(self) -> Any:
        """The wrapped model, under the name that PEFT's models use."""
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone within the block, as with PEFT's models."""
        for layer in self.layers.values():
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.is_enabled = True

    @contextmanager
    def component_alone(self, number: int) -> Iterator[None]:
        """The base with one component, as if it were served, within the block."""
        for layer in self.layers.values():
            layer.alone = number
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.alone = None

    @contextmanager
    def watching_gates(self) -> Iterator[list[torch.Tensor]]:
        """Within the block, a list to which every layer appends ``log α``."""
        log_gates: list[torch.Tensor] = []
        for layer in self.layers.values():
            layer.log_gates = log_gates
        try:
            yield log_gates
        finally:
            for layer in self.layers.values():
                layer.log_gates = None

    def fusion_config(self) -> dict[str, Any]:
        """``adapter_config.json`` of the fusion, without the base's name."""
        return {
            "peft_type": next(iter(LEARNED_FUSION.peft_types)),
            "task_type": "CAUSAL_LM",
            "components": [
                {"name": component.ref.name, "digest": component.ref.digest}
                for component in self.components
            ],
            "d_k": self.d_k,
            "target_modules": sorted({path.rpartition(".")[2] for path in self.layers}),
        }

    def fusion_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their names in ``adapter_model.safetensors``."""
        state = {}
        for path, layer in self.layers.items():
            state[f"{PEFT_PREFIX}{path}.fusion_query.weight"] = layer.query.detach()
            state[f"{PEFT_PREFIX}{path}.fusion_key.weight"] = layer.key.detach()
        return state


# The loss of a learned fusion: cross entropy, and a penalty on leaving the best component.
#
# Cross entropy alone leaves most gates near the mean: once an answer is right, the training
# examples give no further gradient. On other examples, a task's update at half strength is worse
# than at full strength. So each example also pulls every gate towards the component that, on
# its own, answers it best::
#
#     loss = CE + guidance · mean(−log α_best)
#
# over the modules and over the positions up to the last one that is learned. The components' own
# losses determine the best component, not a label.


class FusionLoss(LossFunction):
    """The loss of a batch, summed over its targets; without gradients, the cross entropy alone.

    Args:
        model: The fusion.
        head: The base's ``lm_head``.
        device: The device of the model.
        guidance: Weight of the penalty: nats per learned token for each nat of a gate.
    """

    def __init__(
        self, model: FusionModel, head: torch.nn.Module, device: str, guidance: float
    ) -> None:
        super().__init__(model, head, device)
        self._fusion = model
        self._guidance = guidance
        # Row → best component of each of its examples. Components do not change, so each row is
        # evaluated only once.
        self._best: dict[bytes, torch.Tensor] = {}

    def __call__(self, batch: TrainingBatch) -> torch.Tensor:
        if not self._guidance or not torch.is_grad_enabled():
            return super().__call__(batch)
        best = self._best_components(batch).to(self._device)
        is_read = _is_read(batch).to(self._device)
        with self._fusion.watching_gates() as log_gates:
            loss = super().__call__(batch)
        # Mean over all modules: [rows, positions, components].
        penalty = -torch.stack(log_gates).mean(0).gather(-1, best[..., None]).squeeze(-1)
        share = (penalty * is_read).sum() / is_read.sum()
        return loss + self._guidance * batch.num_targets * share

    def _best_components(self, batch: TrainingBatch) -> torch.Tensor:
        """The best component of every position's example, ``[rows, positions]`` int64."""
        examples = _examples(batch)
        keys = [
            _key_of(tokens, targets)
            for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
        ]
        if any(key not in self._best for key in keys):
            numbers = range(len(self._fusion.components))
            losses = torch.stack([self._component_losses(batch, examples, k) for k in numbers])
            self._best.update(zip(keys, losses.argmin(0).unbind(), strict=True))
        found = [self._best[key] for key in keys]
        # Padding counts as one more example, which the row may not have had when it was evaluated,
        # so limit the number of the example.
        pairs = zip(found, examples, strict=True)
        return torch.stack([best[numbers.clamp(max=len(best) - 1)] for best, numbers in pairs])

    @torch.no_grad()
    def _component_losses(
        self, batch: TrainingBatch, examples: torch.Tensor, number: int
    ) -> torch.Tensor:
        """The cross entropy of every example with one component alone, ``[rows, examples]``."""
        with self._fusion.component_alone(number):
            losses = self.of_targets(batch).cpu()
        rows, positions = (batch.targets != IGNORED).nonzero().unbind(1)
        sums = torch.zeros(batch.targets.shape[0], int(examples.max()) + 1)
        return sums.index_put_((rows, examples[rows, positions]), losses, accumulate=True)


def _examples(batch: TrainingBatch) -> torch.Tensor:
    """The number of each position's example within its row, ``[rows, positions]`` int64."""
    if batch.positions is None:
        return torch.zeros_like(batch.targets)
    return (batch.positions == 0).cumsum(1) - 1


def _is_read(batch: TrainingBatch) -> torch.Tensor:
    """1.0 up to an example's last target, 0.0 after it, ``[rows, positions]``."""
    examples, places = _examples(batch), torch.arange(batch.targets.shape[1])
    targets = torch.where(batch.targets != IGNORED, places, -1)
    last = torch.full((len(targets), int(examples.max()) + 1), -1)
    last.scatter_reduce_(1, examples, targets, "amax")
    return (places <= last.gather(1, examples)).float()


def _key_of(tokens: torch.Tensor, targets: torch.Tensor) -> bytes:
    """A key for a row: its tokens and targets up to the last learned one, without the padding."""
    learned = (targets != IGNORED).nonzero()
    end = int(learned.max()) + 2 if len(learned) else None
    return torch.stack((tokens, targets))[:, :end].numpy().tobytes()
