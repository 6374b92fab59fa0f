"""Fuses registered adapters into a new one, on a separate thread.

One fusion runs at a time, at low priority, one module at a time. It reads its members' files again,
in fp32, because the operators that are served may be rounded. The fusion holds its members as a
request does, so that none is unloaded meanwhile.
"""

from __future__ import annotations

import contextvars
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from turret.server import log
from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MEMBERS,
    TENSORS_FILE,
    Adapter,
    AdapterInfo,
    AdapterRef,
    Mix,
    OwnTemplate,
    template_of,
)
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import PEFT_PREFIX, Finding, refuse_all
from turret.server.adapters.checkpoint.reader import begin_digest
from turret.server.adapters.combination import Combination, FuseResult, ModuleReport
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods import METHODS
from turret.server.adapters.module_fuser import Contribution, FusedModule, ModuleFuser, ratio
from turret.server.adapters.name_table import name_taken
from turret.server.adapters.operators.adapter_operators import beyond_low_rank, beyond_updates
from turret.server.adapters.operators.low_rank import LoraModule
from turret.server.adapters.operators.vectors import Bias
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StagedUpload, UploadedFile
from turret.server.basics.files import safetensors_parts
from turret.server.basics.work import (
    Cancellation,
    is_out_of_memory,
    turret_error,
    work_in_background,
)
from turret.server.errors import (
    AdapterNotFoundError,
    AdapterUnloadedError,
    BudgetExceededError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from turret.server.words import say

# The method of a fusion's result.
METHOD = "lora"


def lora_of(
    modules: Mapping[str, LoraModule], base: BaseModel, base_model: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of a LoRA, with PEFT's keys and names.

    Args:
        modules: The result's modules by path, not empty.
        base: The base of the modules.
        base_model: The base's name for the config.
    """
    has_bias = any(module.bias is not None for module in modules.values())
    ranks = {name: module.rank for name, module in modules.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = module.a
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = module.b
        if has_bias:
            bias = torch.zeros(len(module.b)) if module.bias is None else module.bias
            tensors[f"{PEFT_PREFIX}{name}.lora_B.bias"] = bias
    return _lora_config(ranks, base, base_model, has_bias), tensors


class AdapterFiles:
    """The two files of an adapter.

    Args:
        config: The config, with PEFT's keys.
        tensors: The tensors by PEFT's names, in fp32 on the CPU.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._config = json.dumps(config, indent=2).encode()
        self._parts = list(safetensors_parts(tensors))

    def announced(self) -> list[UploadedFile]:
        """Names and sizes, in the form in which an upload announces them."""
        size = sum(map(len, self._parts))
        return [UploadedFile(CONFIG_FILE, len(self._config)), UploadedFile(TENSORS_FILE, size)]

    def write(self, staged: StagedUpload, check: Callable[[], None]) -> None:
        """Writes and syncs both files; ``check`` is called between pieces and may raise.

        Raises:
            StorageFullError: The disk is full.
        """
        staged.write(CONFIG_FILE, self._config)
        for part in self._parts:
            check()
            staged.write(TENSORS_FILE, part)
        staged.finish()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file of fp32 tensors on the CPU.

    Raises:
        OSError: The disk is full or broken. (The safetensors library raises an error of its own.)
    """
    with path.open("wb") as file:
        file.writelines(safetensors_parts(tensors))


def digest_of(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of an adapter with this config and the file that ``save_tensors`` writes."""
    digest = begin_digest(config)
    for part in safetensors_parts(tensors):
        digest.update(part)
    return digest.hexdigest()


def target_modules(names: list[str], base: BaseModel) -> list[str]:
    """The paths' last components if they select exactly these modules; otherwise the paths."""
    leaves = {_leaf(name) for name in names}
    selected = [name for name in base.modules if _leaf(name) in leaves]
    return sorted(leaves) if len(selected) == len(names) else names


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _lora_config(
    ranks: Mapping[str, int], base: BaseModel, base_model: str, has_bias: bool
) -> dict[str, Any]:
    """The config of a LoRA with these ranks. Alpha equals the rank, so nothing is scaled.

    Args:
        ranks: The ranks by module path, not empty.
        base: The base of the modules.
        base_model: The base's name for the config.
        has_bias: Whether every module has a bias for B.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": next(iter(METHODS["lora"].peft_types)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules(list(ranks), base),
        "bias": "none",
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


@dataclass(frozen=True, slots=True)
class FusionMember:
    """One adapter of the mix.

    Attributes:
        adapter: The generation that is fused.
        weight: Its weight.
        lowered: Its operators in fp32.
    """

    adapter: Adapter
    weight: float
    lowered: Lowered

    def part(self, module: str) -> Contribution | None:
        """The member's update of a module, or None."""
        operators = self.lowered.operators.modules.get(module)
        if operators is None:
            return None
        scaling = self.lowered.scalings.get(module, 1.0)
        return Contribution(self.adapter.name, self.weight, operators, scaling)


def check_operators(members: Sequence[FusionMember], combination: Combination) -> None:
    """Rejects members that the combination cannot represent.

    Raises:
        InvalidRequestError: There are such members. The error lists all of them, each with the part
            that does not fit.
    """
    found: list[Finding] = []
    for index, member in enumerate(members):
        operators, adapter = member.lowered.operators, member.adapter
        if adapter.facts.vocab_size:
            found.append(_unfit(index, adapter, "it has its own vocabulary"))
        elif extra := beyond_updates(operators):
            why = f"a fusion cannot include its {' and '.join(extra)}"
            found.append(_unfit(index, adapter, why))
        elif not combination.is_on_updates and (extra := beyond_low_rank(operators, Bias)):
            why = (
                f"the combination {combination.name} cannot include its {' and '.join(extra)}; use"
                " one with svd"
            )
            found.append(_unfit(index, adapter, why))
    refuse_all(found)


def rank_of_result(members: Sequence[FusionMember], combination: Combination) -> int:
    """Maximum number of singular values to keep, for combinations that end in an SVD.

    Raises:
        InvalidRequestError: The request sets neither rank nor energy, and no member has a rank.
    """
    if combination.rank is not None:
        return combination.rank
    ranks = [rank for member in members for rank in member.lowered.ranks]
    if not ranks and combination.is_on_updates and combination.energy is None:
        raise InvalidRequestError.of("rank", say("RANK_REQUIRED"))
    return max(ranks, default=1)


def _unfit(index: int, adapter: Adapter, why: str) -> Finding:
    text = say("NOT_FUSABLE", adapter=adapter.name, method=adapter.facts.method, why=why)
    return f"adapters[{index}].name", text


_log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class _Job:
    """The current fusion: its request, and its members once it holds them."""

    name: str
    refs: Sequence[AdapterRef]
    combination: Combination
    cancellation: Cancellation
    mix: Mix | None = None


class Fuser:
    """Fuses adapters, one mix at a time. Thread-safe.

    Args:
        registry: The registry of members and results. It reports when a member has to be released.
        host_bytes: The maximum size of the members in fp32 during a fusion.
        max_rank: The maximum rank of a result.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        *,
        host_bytes: int,
        max_rank: int,
    ) -> None:
        self._registry = registry
        self._host_bytes = host_bytes
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="adapter-fuse", initializer=work_in_background
        )
        registry.on_force_unload.append(self._abort)

    @property
    def is_busy(self) -> bool:
        """Whether a fusion is under way."""
        return self._job is not None

    def start(
        self,
        name: str,
        refs: Sequence[AdapterRef],
        combination: Combination,
        cancellation: Cancellation,
    ) -> Future[FuseResult]:
        """Starts to fuse a mix into a new LoRA under ``name``; returns at once.

        Args:
            name: A well-formed name.
            refs: The mix, not empty.
            combination: How to combine the mix.
            cancellation: Stops the fusion before the next module, with the cancellation's error.
                Nothing is registered then.

        Returns:
            A future of the result, or of an error: InvalidRequestError (the combination cannot
            represent the mix; the error names the members), BudgetExceededError (rank or bytes),
            StateDirRequiredError (there is no directory for the files), an error of
            ``AdapterRegistry.acquire`` or ``upload``, or UnavailableError.

        Raises:
            QueueFullError: Another fusion is under way.
            UnavailableError: The server is shutting down.
        """
        job = _Job(name, refs, combination, cancellation)
        with self._lock:
            if self._job is not None:
                raise QueueFullError(say("FUSION_UNDER_WAY"))
            self._job = job
        context = contextvars.copy_context()
        try:
            future = self._thread.submit(context.run, self._run, job)
        except RuntimeError as error:
            self._end(job)
            refusal = turret_error(error, "") if is_out_of_memory(error) else _shutting_down()
            # The executor may keep the work even if it could not start a thread, so cancel it.
            cancellation.set(refusal)
            raise refusal from None
        # A future that is cancelled before it starts never calls _run, so end the job here.
        future.add_done_callback(lambda _: self._end(job))
        return future

    def _abort(self, uuid: str) -> None:
        """Ends the current fusion if it holds a generation of this registration."""
        with self._lock:
            mix = None if self._job is None else self._job.mix
            found = [] if mix is None else [a for a, _ in mix.members if a.uuid == uuid]
            if found and self._job is not None:
                name = found[0].name
                self._job.cancellation.set(
                    AdapterUnloadedError(say("UNLOADED_WHILE_FUSED", adapter=name))
                )

    def close(self) -> None:
        """Ends the current fusion; blocks until it has finished its module."""
        with self._lock:
            if self._job is not None:
                self._job.cancellation.set(_shutting_down())
        self._thread.shutdown(wait=True)

    def _end(self, job: _Job) -> None:
        with self._lock:
            if self._job is job:
                self._job = None

    def _run(self, job: _Job) -> FuseResult:
        try:
            self._registry.check_name(job.name)
            if job.name in {ref.name for ref in job.refs}:
                raise InvalidRequestError.of("name", say("NAME_IS_MEMBER", adapter=job.name))
            self._registry.check_room(0)
            with self._lock:
                mix = job.mix = self._registry.acquire(job.refs)
            base = replace(self._registry.base, dtype=torch.float32)
            try:
                members = self._read(job, mix, base)
                modules = self._fuse(job, members, base)
            finally:
                self._registry.release(mix)
            named = [member.lowered.base_model for member in members if member.lowered.base_model]
            files = AdapterFiles(*lora_of(modules, base, named[0] if named else base.name))
            return _result(self._install(job, files, _template(mix)), modules)
        finally:
            self._end(job)

    def _read(self, job: _Job, mix: Mix, base: BaseModel) -> list[FusionMember]:
        served = self._registry.base.dtype.itemsize
        needed = sum(a.host_bytes_needed * 4 // served for a, _ in mix.members)
        if needed > self._host_bytes:
            text = say("MEMBERS_OVER_BUDGET", bytes=needed, host_bytes=self._host_bytes)
            raise BudgetExceededError(text)
        members = []
        for adapter, weight in mix.members:
            job.cancellation.check()
            lowered = self._registry.reread(adapter, base)
            members.append(FusionMember(adapter, weight, lowered))
        check_operators(members, job.combination)
        return members

    def _fuse(
        self, job: _Job, members: Sequence[FusionMember], base: BaseModel
    ) -> dict[str, FusedModule]:
        work = _work(members, base)
        self._check_free(job.name, list(work))
        rank = rank_of_result(members, job.combination)
        if rank > self._max_rank:
            text = say("RANK_OVER_LIMIT", name="rank", rank=rank, max_rank=self._max_rank)
            raise BudgetExceededError(text, violations=[("rank", text)])
        fuser = ModuleFuser(job.combination, rank, self._max_rank)
        for path, parts in work.items():
            fuser.check(parts, base.modules[path])
        fused: dict[str, FusedModule] = {}
        num_bytes = 0
        started = reported = time.monotonic()
        for path, parts in work.items():
            job.cancellation.check()
            module = fused[path] = fuser.fuse(parts, base.modules[path])
            num_bytes += module.a.nbytes + module.b.nbytes
            # Check after each module, so that a fusion whose files do not fit ends early.
            self._registry.check_room(num_bytes)
            now = time.monotonic()
            if len(fused) == len(work) or now - reported >= REPORT_SECONDS:
                reported = now
                fields = log.fields(
                    adapter=job.name,
                    combination=job.combination.name,
                    modules=f"{len(fused)}/{len(work)}",
                    seconds=f"{now - started:.1f}",
                )
                _log.info("fusing", extra=fields)
        return fused

    def _check_free(self, name: str, paths: list[str]) -> None:
        """Rejects a name that belongs to a different adapter, before any work is done."""
        try:
            record = self._registry.get(name)
        except AdapterNotFoundError:
            return
        changed = sorted({path.rsplit(".", 1)[-1] for path in paths})
        if record.facts.method != METHOD or list(record.facts.target_modules) != changed:
            raise name_taken(name, record.facts.digest)

    def _install(
        self, job: _Job, files: AdapterFiles, chat_template: OwnTemplate | None
    ) -> AdapterInfo:
        staged = self._registry.stage(files.announced())
        try:
            files.write(staged, job.cancellation.check)
            return self._registry.upload(job.name, staged, chat_template=chat_template)
        finally:
            staged.discard()


def _work(members: Sequence[FusionMember], base: BaseModel) -> dict[str, list[Contribution]]:
    """The members' updates by module, in the base's order."""
    work = {
        path: [part for member in members if (part := member.part(path)) is not None]
        for path in base.modules
    }
    work = {path: parts for path, parts in work.items() if parts}
    if not work:
        raise InvalidRequestError.of("adapters", say("NOTHING_TO_FUSE"))
    return work


def _template(mix: Mix) -> OwnTemplate | None:
    """The chat template of the mix, which the result gets as well."""
    text = template_of(adapter.facts for adapter, _ in mix.members)
    return replace(OwnTemplate.from_json(text), origin=MEMBERS) if text else None


def _result(record: AdapterInfo, modules: Mapping[str, FusedModule]) -> FuseResult:
    reports = tuple(
        ModuleReport(path, ratio(module.error, module.reference), module.rank)
        for path, module in modules.items()
    )
    error = math.hypot(*(module.error for module in modules.values()))
    reference = math.hypot(*(module.reference for module in modules.values()))
    return FuseResult(record, ratio(error, reference), reports)


def _shutting_down() -> UnavailableError:
    return UnavailableError(say("SHUTTING_DOWN"))
