"""The memory that a run needs: estimated, rehearsed and measured."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from turret.server.models.decoding.cpu_layers import CpuLayerOps
from turret.server.models.memory import memory_of
from turret.server.models.model_source import HEAD_COPY, StoredTensors, stored_weights
from turret.server.models.sources.model_directory import weight_files
from turret.server.training.learner import BYTES_PER_PARAMETER
from turret.server.training.service import CHUNK_TOKENS, PASS_TOKENS
from turret.training.base_model import DTYPES, empty_model, resident_bytes
from turret.training.batches import BatchRow, make_batch
from turret.training.classifier import classifier_loss
from turret.training.engine import attach_to, pad_token, trainable
from turret.training.in_process_engine import in_process_engines, is_shared
from turret.training.loss import LossFunction
from turret.training.settings import read_config, render_config
from turret.training.settings.resolve import Resolved, resolve
from turret.training.trainer import make_stream
from turret.training.words import RunError, Text, say


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that this context created and that still exist.

    It also counts storages on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_leaves((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Some methods read a value (VB-LoRA tests for infinity), which a meta tensor does not
            # have: use 0.
            return args[0].new_zeros((), device="cpu").item()
        result = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in inputs if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        # The result of a view or an in-place operation has the storage of an input.
        if storage in self._known or id(storage) in inputs:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


# An estimate of the memory that a run needs, from one step on the meta device.
#
# The step runs on shapes alone, with the method attached and the model called as in training,
# while every new tensor is counted. The estimate thus follows the method, the architecture and the
# lengths of the data without a formula for any of them. It takes a few seconds and no memory,
# whatever the model's size. Attention is assumed to keep its inputs and its result, as PyTorch's
# fused kernels do.

# Bytes of AdamW state per weight: two moments in fp32 or in 8 bits.
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged-adamw8bit": 2}
_CUDA_BYTES = 1 << 30
_ATTENTION = "turret_shapes"
# Any: ``patch`` is created at run time, so type checkers do not see it.
_SHAPES: Any = _config


class _FusedAttention(torch.autograd.Function):
    """An attention with the shapes of a kernel that never stores the scores."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **keywords: Any
) -> tuple[torch.Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


# transformers creates no mask for a name without a mask function.
AttentionInterface.register(_ATTENTION, _attention)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The bytes that each part of a run takes.

    Attributes:
        process: This process with its libraries and data; on a GPU, an allowance for the CUDA
            context, workspaces of libraries and gaps between allocations.
        base: The base model's weights.
        adapter: Trained weights (fp32) and the optimizer's states.
        step: Activations and gradients at their peak, in the largest batch of the run.
        num_parameters: Trained weights.
    """

    process: int
    base: int
    adapter: int
    step: int
    num_parameters: int

    @property
    def total(self) -> int:
        return self.process + self.base + self.adapter + self.step


def estimate_memory(resolved: Resolved) -> MemoryEstimate:
    """Estimate the peak of a run."""
    if is_shared(resolved):
        return _estimate_shared(resolved)
    config = resolved.config
    base = config.base
    assert base.weights is not None
    assert base.dtype is not None
    assert base.device is not None
    process = resident_bytes() if base.device == "cpu" else _CUDA_BYTES
    model = empty_model(resolved.base, base.weights, DTYPES[base.dtype], base.device)
    model.set_attn_implementation(_ATTENTION)
    model = attach_to(model, resolved)
    step = _step_bytes(resolved, model)
    num_parameters = sum(parameter.numel() for parameter in trainable(model).values())
    states = _STATE_BYTES[config.optimizer.name] * num_parameters
    return MemoryEstimate(
        process=process,
        base=_base_bytes(resolved, model),
        adapter=4 * num_parameters + states,
        step=step,
        num_parameters=num_parameters,
    )


def _estimate_shared(resolved: Resolved) -> MemoryEstimate:
    """The estimate by a formula, because a pass of the engine cannot run on the meta device."""
    base, arch = resolved.config.base, resolved.base.arch
    assert base.dtype is not None
    size, num_layers = DTYPES[base.dtype].itemsize, arch.num_layers
    model = attach_to(empty_model(resolved.base, "nf4-dense", torch.float32, "cpu"), resolved)
    num_parameters = sum(parameter.numel() for parameter in trainable(model).values())
    train, _ = largest_rows(resolved)
    num_soft = resolved.config.method.num_virtual_tokens or 0
    lengths = [num_soft + len(example.tokens) for row in train for example in row]
    num_rows = min(sum(lengths), max(PASS_TOKENS, *lengths))
    # A row is kept at the input and the result of each projection and norm, and in the KV cache.
    projections = arch.linears().values()
    widths = sum(slices[0][2] + sum(out for _, out, _ in slices) for slices in projections)
    widths += 2 * (arch.hidden_size + arch.num_kv_heads * arch.head_dim)
    # The backward pass of an MLP has the gate, the products and their gradients in float32.
    in_backward = 4 * 8 * arch.intermediate_size
    # Without compiled kernels for a layer, the backward pass of attention has all scores.
    scores = 0
    if not CpuLayerOps.serves(arch):
        scores = 4 * 4 * arch.num_heads * max(CHUNK_TOKENS, *lengths) * max(lengths)
    logits = 4 * 4 * CHUNK_TOKENS * arch.vocab_size
    return MemoryEstimate(
        process=resident_bytes(),
        base=memory_of(arch, stored_weights(resolved.base.source).storage()).base,
        adapter=BYTES_PER_PARAMETER * num_parameters,
        step=num_rows * (num_layers * widths * size + in_backward) + max(scores, logits),
        num_parameters=num_parameters,
    )


def largest_rows(resolved: Resolved) -> tuple[Sequence[BatchRow], Sequence[BatchRow]]:
    """The rows of the training batch and the validation batch that take the most memory.

    Without validation examples, the latter is empty.
    """
    config = resolved.config
    assert config.run.steps is not None
    stream = make_stream(resolved)
    count = config.run.steps * config.run.gradient_accumulation
    train = max((stream.rows(index) for index in range(count)), key=_room)
    rows, size = resolved.dataset.validation, config.run.batch_size
    validation = [rows[start : start + size] for start in range(0, len(rows), size)]
    return train, max(validation, key=_room, default=())


def _room(rows: Sequence[BatchRow]) -> tuple[int, int]:
    """The tokens of a batch, with padding, and those that are learned."""
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    return len(rows) * longest, sum(sum(each.learned[1:]) for row in rows for each in row)


def _step_bytes(resolved: Resolved, model: Any) -> int:
    pad, is_packed = pad_token(resolved.base.tokenizer), resolved.config.data.packing
    rows, held_out = largest_rows(resolved)
    train = make_batch(rows, pad=pad, is_packed=is_packed)
    head = model.get_base_model().get_output_embeddings()
    loss = LossFunction(model, head, "meta")
    if resolved.dataset.labels:
        loss = classifier_loss(model, resolved.dataset, "meta")
    # aLoRA's mask has no values on meta tensors; assume that it selects every token of a row.
    with LiveBytes() as live, _SHAPES.patch(meta_nonzero_assume_all_nonzero=True):
        model.train()
        # The gradients of the first pass are in memory while the second pass runs.
        for _ in range(min(2, resolved.config.run.gradient_accumulation)):
            loss(train).backward()
        model.eval()
        for parameter in trainable(model).values():
            parameter.grad = None
        if held_out:
            with torch.no_grad():
                loss(make_batch(held_out, pad=pad, is_packed=False))
    return live.peak


def _base_bytes(resolved: Resolved, model: Any) -> int:
    if resolved.config.base.weights == "nf4":
        stored = StoredTensors(weight_files(resolved.base.source.weights), None)
        # Training does not read the tensors that the file has only for the server's CPU path.
        unused = (":absmax", *HEAD_COPY)
        return sum(
            stored.get(name, is_kept=False).nbytes for name in stored if not name.endswith(unused)
        )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(parameter.nbytes for parameter in frozen)


_STEPS = 2


def measure_peak(resolved: Resolved, scratch: Path) -> int:
    """The peak memory of two steps on the largest batch, which a separate process runs.

    The result is in bytes, of the kind that ``peak_memory_bytes`` reports.

    Args:
        resolved: The run, which writes nothing.
        scratch: An empty directory.

    Raises:
        RunError: The process failed, perhaps because memory ran out. The message contains the last
            line that it printed.
    """
    config = scratch / "config.toml"
    config.write_text(render_config(resolved.config), encoding="utf-8")
    command = [sys.executable, "-m", "turret.training.memory", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(_why_failed(done))
    return int(done.stdout)


def _why_failed(done: subprocess.CompletedProcess[str]) -> Text:
    if done.returncode == -signal.SIGKILL:
        # SIGKILL is usually the system's reaction to a lack of memory.
        return say("REHEARSAL_KILLED")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return say("REHEARSAL_FAILED", problem=last)


def rehearse(config_file: Path) -> int:
    """Run the steps and the validation's largest batch here; returns the peak in bytes."""
    resolved = resolve(read_config(config_file), config_file.parent)
    config = resolved.config
    assert config.optimizer.learning_rate is not None
    train, validation = largest_rows(resolved)
    with in_process_engines() as open_engine, closing(open_engine(resolved)) as engine:
        for _ in range(_STEPS):
            engine.backward([train] * min(2, config.run.gradient_accumulation))
            engine.step(config.optimizer.learning_rate)
        if validation:
            engine.loss(validation)
        return engine.peak_memory()


if __name__ == "__main__":
    print(rehearse(Path(sys.argv[1])))
