"""Builds the parts that answer requests: model, engine and adapter registry."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from turret.kernels.cpu import has_native, use_own_threads
from turret.server import log
from turret.server.adapters.base import Allowed, BaseModel, Precision
from turret.server.adapters.device import AdapterStore, StepStore
from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.device.gpu_uploads import StepStream
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.adapters.fuser import Fuser
from turret.server.adapters.merger import ChangeBase, Edit, Merger
from turret.server.adapters.methods import METHODS
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import NoStateDir, open_state_dir
from turret.server.api.gate import Backend
from turret.server.api.vocabularies import Vocabularies, Vocabulary
from turret.server.basics.machine import LEAST_CAPABILITY, keep_compiled_in, missing_for_triton
from turret.server.basics.work import compute_on_this_thread
from turret.server.config import (
    ADAPTER_DEVICE_BYTES,
    KV_CACHE_BYTES,
    AdapterConfig,
    Config,
    ModelConfig,
)
from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.engine.engine import Engine
from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.speculation import Speculation, StepCost
from turret.server.engine.step.runner import Executor, Runner, TorchExecutor
from turret.server.errors import InvalidRequestError
from turret.server.log import progress_bar
from turret.server.metrics import Metrics
from turret.server.models.chat_template import base_template
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.describe import BaseEdit, ModelInfo, describe_base, describe_projections
from turret.server.models.loader import eos_token_ids, formulations, load_decoder
from turret.server.models.memory import memory_of
from turret.server.models.model_source import ModelSource, resolve_model
from turret.server.models.own_tokenizers import OwnTokenizers
from turret.server.models.sources.check import default_cache_dir
from turret.server.models.tokenizer import Tokenizer
from turret.server.remote import AdapterHub, RemoteAdapters
from turret.server.training.service import TrainingService
from turret.server.words import say

_log = logging.getLogger(__name__)

# Maximum time for which another thread may hold the interpreter's lock while steps run on a CUDA
# device.
_SWITCH_SECONDS = 5e-4
# Maximum number of prompt tokens in a GPU step whose sequences mostly decode. Smaller steps would
# make prompts much slower, because each dequantises all weights. By computation, not yet by
# measurement, a step of an 8B model with 512 tokens takes a third of the time of one with 2,048.
_GPU_CHUNK = 512
# Positions per KV block; must divide the tile size of the attention kernels.
BLOCK_SIZE = 16


# Prepares the device for an adapter that is being loaded; raises an error if it does not fit.
Admit = Callable[[AdapterOperators], None]


class ReplicaParts(Protocol):
    """Makes the parts of a replica that are joined to its fleet."""

    def registry(
        self, config: AdapterConfig, base: BaseModel, metrics: Metrics, admit: Admit
    ) -> AdapterRegistry: ...

    def merger(
        self,
        *,
        edit: Callable[[Precision], Edit],
        describe: Callable[[int], BaseModel],
        change_base: ChangeBase,
        metrics: Metrics,
    ) -> Merger: ...


def build_backend(
    config: Config,
    metrics: Metrics,
    *,
    gpu: bool | None = None,
    replica: ReplicaParts | None = None,
    state: NoStateDir | None = None,
) -> Backend:
    """Load the model. Blocks until it is loaded; call it in a separate thread.

    Args:
        config: The resolved configuration.
        metrics: The metrics of the server.
        gpu: Whether steps run as Triton kernels; None lets the device decide (on the CPU, only
            Triton's interpreter could run them).
        replica: Makes the parts that a replica shares with its fleet; None for a single server.
        state: The state directory of a single server; None opens the one of the configuration.

    Returns:
        The backend, whose engine is not started yet.

    Raises:
        InvalidRequestError: The model cannot be served.
        OSError: A file cannot be read.
        ValueError: Another server uses the state directory, or it is for another base model.
    """
    started = time.monotonic()
    device = _choose_device(config.model)
    gpu = device.type == "cuda" if gpu is None else gpu
    source, decoder = _load(config.model, device, gpu=gpu)
    dtype = decoder.dtype
    if config.adapters.training and decoder.arch.experts is not None:
        raise InvalidRequestError.of("training", say("NO_TRAINING_OF_EXPERTS"))
    tokenizer = Tokenizer.load(source.files, eos_token_ids(source.files), decoder.arch.vocab_size)
    if config.model.chat_template is not None:
        tokenizer = tokenizer.with_template(base_template(config.model.chat_template))
    own = OwnTokenizers(tokenizer, source.files / "config.json")
    describe = functools.partial(describe_base, decoder, source, named=tokenizer.vocab_size)
    base = describe(1)
    path = "gpu" if gpu else "cpu" if has_native(dtype, device) else "torch"
    store = _build_store(path, config.adapters, decoder, metrics)
    make_registry = functools.partial(_build_registry, state)
    if replica is not None:
        make_registry = replica.registry
    registry = make_registry(config.adapters, base, metrics, store.admit)
    registry.tokenizers.check_with(own.check)
    engine, is_screened = _build_engine(config, metrics, decoder, store, registry, tokenizer)
    _log.info(
        "model loaded",
        extra=log.fields(
            model=source.name,
            seconds=round(time.monotonic() - started, 2),
            path=path,
            chat_template=_template_shown(config.model, tokenizer),
            adapter_device_bytes=store.max_bytes,
            digest=source.digest,
            weights=str(decoder.fidelity),
            weights_bytes=memory_of(decoder.arch, decoder.fidelity.storage()).base,
            **formulations(decoder, is_head_screened=is_screened),
        ),
    )
    limits = config.adapters
    fuser = Fuser(registry, host_bytes=limits.adapter_host_bytes, max_rank=limits.max_rank)
    make_merger = functools.partial(Merger, registry) if replica is None else replica.merger
    merger = make_merger(
        edit=lambda precision: BaseEdit(decoder, precision),
        describe=describe,
        change_base=engine.change_base,
        metrics=metrics,
    )
    training = None
    if config.adapters.training:
        training = _build_training(limits, engine, decoder, store, registry, metrics)
    vocabulary = Vocabulary(tokenizer, ConstraintCompiler(tokenizer))
    return Backend(
        engine=engine,
        registry=registry,
        fuser=fuser,
        merger=merger,
        tokenizer=tokenizer,
        vocabularies=Vocabularies(
            vocabulary,
            registry.tokenizers,
            own,
            trusts_templates=config.security.trust_request_chat_template,
        ),
        model_info=_model_info(decoder, source, engine),
        methods=tuple(sorted(METHODS)),
        training=training,
    )


def compile_kernels(config: Config, capabilities: Iterable[int]) -> None:
    """Compile the kernels for a start on NVIDIA GPUs into Triton's cache, without a GPU.

    Args:
        config: The configuration of the start.
        capabilities: The compute capabilities, for example 90 for 9.0.

    Raises:
        InvalidRequestError: The model cannot be served.
        OSError: A file cannot be read.
    """
    # Imported here because it needs Triton.
    from turret.server.engine.step.gpu_executor import GpuExecutor, compile_launches, compile_steps

    keep_compiled_in(default_cache_dir() / "triton")
    _, decoder = _load(config.model, torch.device("meta"), gpu=True)
    metrics = Metrics()
    store = _build_store("gpu", config.adapters, decoder, metrics)
    cache = KvCache(decoder.arch, 2, BLOCK_SIZE, decoder.dtype, decoder.device)
    executor = _build_executor(config, decoder, cache, store, metrics)
    assert isinstance(executor, GpuExecutor)
    executor.sampler(frozenset())
    for capability in capabilities:
        with progress_bar() as progress:
            compile_launches(lambda: compile_steps(executor, progress), capability)


def _load(config: ModelConfig, device: torch.device, *, gpu: bool) -> tuple[ModelSource, Decoder]:
    with progress_bar() as progress:
        source = resolve_model(
            config.model,
            default_cache_dir(),
            progress,
            quantizes_all=config.quantize_all,
            skip_modules=config.skip_modules,
        )
        dtype: torch.dtype = getattr(torch, config.dtype)
        return source, load_decoder(source, dtype=dtype, device=device, gpu=gpu, progress=progress)


def _build_training(
    config: AdapterConfig,
    engine: Engine,
    decoder: Decoder,
    store: AdapterStore,
    registry: AdapterRegistry,
    metrics: Metrics,
) -> TrainingService:
    """The service that trains adapters."""
    layout = describe_projections(decoder.arch)
    if not isinstance(store, StepStore):
        store = ReferenceStore(layout, decoder.dtype, decoder.device, _device_bytes(config))
    return TrainingService(
        engine,
        decoder,
        layout,
        store,
        registry,
        max_rank=config.max_rank,
        max_bytes=config.training_bytes,
        metrics=metrics,
    )


def _device_bytes(config: AdapterConfig) -> int:
    """The device memory for adapters in training.

    An adapter in training takes 32 bytes per parameter in host memory. On the device, a pass takes
    about 10 bytes per parameter: the operator in the serving dtype, and the trained tensor and its
    gradient in float32.
    """
    return config.training_bytes // 3


def _template_shown(model: ModelConfig, tokenizer: Tokenizer) -> str:
    if model.chat_template is not None:
        return str(model.chat_template)
    return "the model's own" if tokenizer.has_template else "none"


def _build_store(
    path: str, config: AdapterConfig, decoder: Decoder, metrics: Metrics
) -> AdapterStore:
    budget, device = config.adapter_device_bytes, decoder.device
    if budget is None:
        budget = ADAPTER_DEVICE_BYTES
        if device.type == "cuda":
            from turret.server.engine.step.gpu_executor import adapter_bytes

            budget = adapter_bytes(device)
    num_bytes = metrics.adapter_bytes.labels("device")
    num_bytes.set(0)

    def moved(adapter: Any) -> None:
        num_bytes.set(store.adapter_bytes)
        if not adapter.is_retired:
            metrics.adapter_residency(adapter.name, adapter.residency)

    layout = describe_projections(decoder.arch)
    store = _store_type(path)(layout, decoder.dtype, device, budget, on_moved=moved)
    return store


def _store_type(path: str) -> Callable[..., AdapterStore]:
    if path != "gpu":
        return CpuStore if path == "cpu" else ReferenceStore
    # Import this here, because the other compute paths run without Triton.
    from turret.server.adapters.device.gpu_store import GpuStore

    return GpuStore


def _build_executor(
    config: Config, decoder: Decoder, cache: KvCache, store: AdapterStore, metrics: Metrics
) -> Executor[Any, Any]:
    if isinstance(store, StepStore):
        return TorchExecutor(decoder, cache, store, screens_head=config.model.head_screen)
    from turret.server.adapters.device.gpu_store import GpuStore
    from turret.server.engine.step.gpu_executor import GpuExecutor, capture_for
    from turret.server.models.decoding.gpu_decoder import GpuDecoder

    assert isinstance(store, GpuStore)
    assert isinstance(decoder, GpuDecoder)
    max_num_seqs, max_num_batched_tokens = config.scheduler.sizes(decoder.device.type)
    return GpuExecutor(
        decoder,
        cache,
        store,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        capture=capture_for(decoder.device),
        on_graphs_off=lambda: metrics.cuda_graphs_off.set(1),
    )


def _choose_device(model: ModelConfig) -> torch.device:
    """The serving device. If it is a CUDA device, ``see_only`` has made it the first one."""
    wanted = model.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidRequestError.of("device", say("NO_CUDA_DEVICE", device=model.device))
    capability = torch.cuda.get_device_capability(0)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, one)) for one in (capability, LEAST_CAPABILITY))
        why = say("GPU_TOO_OLD", found=found, least=least)
        if wanted != "auto":
            raise InvalidRequestError.of("device", why)
        _log.warning("serving on the CPU", extra=log.fields(why=why))
        return torch.device("cpu")
    if missing := missing_for_triton():
        raise InvalidRequestError.of("device", say("KERNELS_NEED", missing=missing))
    keep_compiled_in(default_cache_dir() / "triton")
    return torch.device("cuda", 0)


def _build_registry(
    state: NoStateDir | None,
    config: AdapterConfig,
    base: BaseModel,
    metrics: Metrics,
    admit: Admit,
) -> AdapterRegistry:
    if state is None:
        state = open_state_dir(config.state_dir, config.max_upload_bytes)
    state.bind(base.name, base.digest)
    registry = AdapterRegistry(
        config.adapter_root,
        base,
        config.adapter_host_bytes,
        config.max_rank,
        metrics,
        state=state,
        allowed=Allowed(config.allow_other_base, config.allow_dense_adapters, config.strict_base),
        hub=AdapterHub(config.adapter_hub, config.max_upload_bytes),
        remotes=RemoteAdapters(config.adapter_remote, config.max_upload_bytes),
        admit=admit,
        keep_generations=config.keep_generations,
    )
    count = registry.restore()
    if state.path is not None:
        _log.info("adapters restored", extra=log.fields(count=count, state_dir=state.path))
    return registry


def _build_engine(
    config: Config,
    metrics: Metrics,
    decoder: Decoder,
    store: AdapterStore,
    registry: AdapterRegistry,
    tokenizer: Tokenizer,
) -> tuple[Engine, bool]:
    """The engine, and whether it finds greedy tokens with an int8 copy of the head."""
    arch = decoder.arch
    per_block = KvCache.block_bytes(arch, BLOCK_SIZE, decoder.dtype)
    max_num_seqs, max_num_batched_tokens = config.scheduler.sizes(decoder.device.type)
    num_bytes = _kv_bytes(config, decoder, store, metrics)
    num_blocks = num_bytes // per_block
    if num_blocks < 2:
        said = say("TOO_SMALL", least=2 * per_block, value=num_bytes)
        raise InvalidRequestError.of("kv-cache-bytes", said)
    cache = KvCache(arch, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
    executor = _build_executor(config, decoder, cache, store, metrics)
    runner = Runner(executor, tokenizer.eos_token_ids)
    stream = StepStream(decoder.device)
    if decoder.device.type == "cuda":
        _warm_up(executor, stream)

    def is_ready(sequence: Sequence) -> bool:
        # A sequence that runs alone waits for its adapters in its first step, because it delays no
        # other sequence.
        return engine.is_ready(sequence) and (not scheduler.running or runner.is_near(sequence))

    engine: Engine
    # Steps of the GPU path sample one token per sequence, in a captured graph, so they cannot
    # verify drafts.
    wanted = config.scheduler.speculation if isinstance(executor, TorchExecutor) else "off"
    cost = StepCost()
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        is_ready=is_ready,
        fits=runner.fits,
        preempt_after_seconds=config.scheduler.preempt_after_seconds or None,
        speculation=None if wanted == "off" else Speculation(cost, remembers=wanted == "auto"),
        cost=cost if isinstance(executor, TorchExecutor) else None,
        most_beside=_GPU_CHUNK,
        attention_span=arch.attention_span if isinstance(executor, TorchExecutor) else math.inf,
    )
    engine = Engine(
        scheduler=scheduler,
        runner=runner,
        adapters=registry,
        tokenizer=tokenizer,
        metrics=metrics,
        max_model_len=arch.max_model_len,
        long_from=arch.long_from,
        speculates=wanted != "off",
        allow_merged_twice=config.adapters.allow_merged_twice,
        max_queued_requests=config.scheduler.max_queued_requests,
        max_queued_bytes=config.scheduler.max_queued_bytes,
        on_thread=lambda: _on_stream(stream, decoder.dtype, decoder.device),
    )
    return engine, executor.screens_head


@contextlib.contextmanager
def _on_stream(stream: StepStream, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The context in which the engine's thread works."""
    if device.type == "cuda":
        # Little work is left to the CPU, so a team of threads would only wait for itself.
        compute_on_this_thread()
        # The device idles while this thread waits for the interpreter's lock, so make other
        # threads release it sooner.
        sys.setswitchinterval(_SWITCH_SECONDS)
    elif has_native(dtype, device):
        # Compiled kernels do most of the work of a step, on their own threads.
        use_own_threads()
        compute_on_this_thread()
    with stream.entered():
        yield


def _warm_up(executor: Executor[Any, Any], stream: StepStream) -> None:
    from turret.server.engine.step.gpu_executor import GpuExecutor, warm_up

    assert isinstance(executor, GpuExecutor)
    started = time.monotonic()
    with stream.entered(), progress_bar() as progress:
        warm_up(executor, progress)
    torch.cuda.synchronize()
    seconds = round(time.monotonic() - started, 2)
    _log.info("decode steps captured", extra=log.fields(seconds=seconds))


def _kv_bytes(config: Config, decoder: Decoder, store: AdapterStore, metrics: Metrics) -> int:
    """Size of the KV cache: as configured, or the remaining memory of a CUDA device."""
    wanted, device = config.cache.kv_cache_bytes, decoder.device
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return KV_CACHE_BYTES
    from turret.server.adapters.device.gpu_store import GpuStore
    from turret.server.engine.step.gpu_executor import (
        GpuExecutor,
        largest_step,
        measure,
        spare_bytes,
    )

    max_num_seqs, max_num_batched_tokens = config.scheduler.sizes(device.type)
    step = largest_step(max_num_batched_tokens, max_num_seqs, BLOCK_SIZE)
    cache = KvCache(decoder.arch, 2, BLOCK_SIZE, decoder.dtype, device)
    executor = _build_executor(config, decoder, cache, store, metrics)
    runner = Runner(executor, frozenset())
    taken = {"step_bytes": measure(lambda: runner.run(step), device)}
    if config.adapters.training:
        from turret.server.training.training_pass import largest_pass

        layout = describe_projections(decoder.arch)
        reference = ReferenceStore(layout, decoder.dtype, device, 0)
        one = largest_pass(decoder, layout, reference)
        taken |= {"pass_bytes": measure(one, device)}
        taken |= {"training_bytes": _device_bytes(config.adapters)}
    assert isinstance(executor, GpuExecutor)
    assert isinstance(store, GpuStore)
    # Each captured step keeps its own final hidden states, but all share the memory of the logits.
    rows = sum(bucket for bucket, _ in executor.forms())
    taken |= {"captured_bytes": rows * decoder.arch.hidden_size * decoder.dtype.itemsize}
    taken |= {"adapter_bytes": store.later_bytes, "spare_bytes": spare_bytes(device)}
    left = torch.cuda.mem_get_info(device)[0] - sum(taken.values())
    # Beyond twice the memory of all sequences at maximum length, blocks would only hold prefixes
    # that are not requested again.
    arch = decoder.arch
    most = 2 * max_num_seqs * KvCache.block_bytes(arch, arch.max_model_len, decoder.dtype)
    _log.info("memory planned", extra=log.fields(**taken, kv_cache_bytes=min(left, most)))
    return min(left, most)


def _model_info(decoder: Decoder, source: ModelSource, engine: Engine) -> ModelInfo:
    arch = decoder.arch
    return ModelInfo(
        name=source.name,
        model_type=arch.model_type,
        digest=source.digest,
        dtype=str(decoder.dtype).removeprefix("torch."),
        quantization="nf4",
        vocab_size=arch.vocab_size,
        max_model_len=engine.max_model_len,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        commit=source.commit,
    )
