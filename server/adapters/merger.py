"""Merges a mix into the base and removes it again, while the server answers requests.

The merged weights are computed module by module on the caller's thread, and stored alongside those
in use. Only then do requests wait: running ones finish, the weights are exchanged between two
steps, and waiting requests continue with the new base. A merge that fails or is cancelled before
the exchange leaves no trace.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from turret.server import log
from turret.server.adapters.adapter import AdapterRef, HostResult, Mix
from turret.server.adapters.base import BaseModel, ChangedBase, Precision
from turret.server.adapters.checkpoint import refuse_all
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    add_delta,
    beyond_updates,
    frobenius_norm,
)
from turret.server.adapters.registry import AdapterRegistry
from turret.server.basics.work import Cancellation, compute_on_this_thread
from turret.server.errors import (
    InvalidRequestError,
    MergeActiveError,
    MergeUnderWayError,
    NotMergedError,
)
from turret.server.metrics import Metrics
from turret.server.words import say


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A member of a merged mix, with its name at the time of the merge."""

    name: str
    uuid: str
    generation: int
    weight: float
    digest: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The difference between the stored weights and the exact ones.

    Attributes:
        relative_error: ``‖stored − exact‖ / ‖exact‖``, Frobenius norms over all changed modules,
            where ``exact = W + Σ w_k ΔW_k`` in fp32, and ``stored`` is the weight in use.
        update_error: ``‖stored − exact‖ / ‖exact − W‖``, the error as a share of the change. At 1,
            the error is as large as the change. 0 if there was no change.
        modules: ``relative_error`` of each changed module, by path, in the base's order.
    """

    relative_error: float
    update_error: float
    modules: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveMerge:
    """A merge that is in effect, or is ready to take effect.

    Attributes:
        adapters: The mix, in the request's order.
        precision: The format of the merged weights.
        time: The time at which the merged weights were complete, in Unix seconds.
        report: The difference between the stored weights and the exact ones.
    """

    adapters: tuple[MergedAdapter, ...]
    precision: Precision
    time: float
    report: MergeReport


@dataclass(frozen=True, slots=True)
class MergeState:
    """The base's generation, and the merge that is in effect, or None."""

    base_generation: int
    merge: ActiveMerge | None = None


_log = logging.getLogger(__name__)

# NF4 counts as keeping an update if ``update_error`` is at most this. For the example adapters, the
# error is over 1 in NF4, and 0.08 to 0.14 in BF16 (docs/combining.md).
KEPT_ERROR = 0.1
# NF4 is tried on this many modules, those of one decoder layer, before BF16 is used instead.
_TRIAL_MODULES = 7

# Makes the engine change the base once no request runs; see ``Engine.change_base``.
ChangeBase = Callable[[Callable[[], ChangedBase]], "Future[None]"]


class Edit(Protocol):
    """The methods of ``BaseEdit`` (``server/models/describe.py``) that a merge uses."""

    def put_weight(self, path: str, weight: torch.Tensor) -> torch.Tensor: ...
    def put_bias(self, path: str, change: torch.Tensor) -> None: ...
    def join(self) -> None: ...
    def swap(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparedMerge:
    """Merged weights that are not in use yet, and the mix from which they were made."""

    edit: Edit
    merge: ActiveMerge
    mix: Mix


class Merger:
    """Merges mixes and removes them again. Thread-safe; every method except ``state`` blocks.

    Args:
        registry: The registry of the adapters.
        edit: Begins an edit of the base as loaded.
        describe: Describes the base with its present weights, under the given generation.
        change_base: See ``ChangeBase``.
        metrics: Receives whether a merge is active.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        *,
        edit: Callable[[Precision], Edit],
        describe: Callable[[int], BaseModel],
        change_base: ChangeBase,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._edit = edit
        self._describe = describe
        self._change_base = change_base
        self._metrics = metrics
        self._turn = threading.Lock()
        self._state = MergeState(registry.base.generation)
        self._active: Edit | None = None

    @property
    def state(self) -> MergeState:
        """The current merge state."""
        return self._state

    def merge(
        self, refs: Sequence[AdapterRef], precision: Precision | None, cancellation: Cancellation
    ) -> MergeState:
        """Makes ``W + Σ w_k ΔW_k``, with biases added likewise, the base of every later request.

        The update is that of the adapters as served, with operators in the serving dtype and gains
        computed from the served weight. It is added in fp32. At any time, only one module's weight
        is a dense matrix.

        Args:
            refs: The mix.
            precision: The format of the merged weights; None for NF4 if that keeps the update, else
                BF16.
            cancellation: Set when the caller has gone; until the weights have been exchanged, this
                cancels the merge.

        Raises:
            InvalidRequestError: The mix is empty, a member changes more than weights and biases, or
                a merged weight is not finite.
            MergeActiveError: A merge is active.
            MergeUnderWayError: Another merge or unmerge is under way.
            AdapterNotFoundError, BudgetExceededError, AdapterCheckpointError: The adapters cannot
                be used.
            UnavailableError: The server is stopping.
            TurretError: The one that ``cancellation`` was set with.
        """
        with self._only_change():
            if self._state.merge is not None:
                raise MergeActiveError(say("MERGE_ACTIVE"))
            if not refs:
                raise InvalidRequestError.of("adapters", say("EMPTY_MIX"))
            prepared = self._prepare(refs, precision, cancellation)
            try:
                self._apply(prepared.edit, prepared.merge, cancellation)
            finally:
                self._registry.release(prepared.mix)
        return self._state

    def _prepare(
        self, refs: Sequence[AdapterRef], precision: Precision | None, cancellation: Cancellation
    ) -> PreparedMerge:
        """Makes merged weights alongside those in use. The caller must release the result's mix."""
        mix = self._registry.acquire(refs)
        try:
            _wait_until_resident(mix, cancellation)
            _check_mergeable(mix)
            precision, edit, report = self._build(precision, mix, cancellation)
        except BaseException:
            self._registry.release(mix)
            raise
        adapters = tuple(
            MergedAdapter(a.name, a.uuid, a.generation, weight, a.digest)
            for a, weight in mix.members
        )
        merge = ActiveMerge(adapters=adapters, precision=precision, time=time.time(), report=report)
        return PreparedMerge(edit, merge, mix)

    def _build(
        self, wanted: Precision | None, mix: Mix, cancellation: Cancellation
    ) -> tuple[Precision, Edit, MergeReport]:
        """Stores the merged weights in NF4 or BF16; see ``merge`` for the choice if none is wanted.

        Returns:
            The precision, the edit that holds the weights, and how they differ from the exact ones.
        """
        base = self._registry.base
        if wanted is None:
            edit = self._edit("NF4")
            report = _build_edit(edit, base, mix, cancellation, most_error=KEPT_ERROR)
            if report is not None:
                return "NF4", edit, report
        precision: Precision = wanted or "BF16"
        edit = self._edit(precision)
        report = _build_edit(edit, base, mix, cancellation)
        assert report is not None, "without a limit it goes to the end"
        return precision, edit, report

    def unmerge(self, cancellation: Cancellation) -> MergeState:
        """Puts the base's own weights back, which have stayed in memory during the merge.

        Raises:
            NotMergedError: No merge is active.
            MergeUnderWayError: Another merge or unmerge is under way.
            UnavailableError, TurretError: See ``merge``.
        """
        with self._only_change():
            if self._active is None:
                raise NotMergedError(say("NOT_MERGED"))
            self._apply(self._active, None, cancellation)
        return self._state

    @contextlib.contextmanager
    def _only_change(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise MergeUnderWayError(say("MERGE_UNDER_WAY"))
        try:
            yield
        finally:
            self._turn.release()

    def _apply(
        self,
        edit: Edit,
        merge: ActiveMerge | None,
        cancellation: Cancellation,
        generation: int | None = None,
    ) -> None:
        """Exchanges the base's weights with those of ``edit``.

        Args:
            edit: The merged weights, or the base's own ones while a merge is active.
            merge: The merge; None for an unmerge.
            cancellation: See ``merge``.
            generation: The base's generation afterwards, which a fleet determines for its replicas;
                None for the next one.
        """
        if generation is None:
            generation = self._state.base_generation + 1
        state = MergeState(generation, merge)
        members = () if merge is None else merge.adapters
        merged = frozenset(key for a in members if a.weight for key in (a.uuid, a.digest))

        def change() -> ChangedBase:
            edit.swap()
            self._state, self._active = state, None if merge is None else edit
            self._metrics.merge_active.set(merge is not None)
            changed = self._registry.change_base(self._describe(state.base_generation))
            return replace(changed, merged=merged)

        outcome = self._change_base(change)
        if not cancellation.wait(outcome) and outcome.cancel():
            cancellation.check()
        outcome.result()
        names = ",".join(a.name for a in members)
        _log.info(
            "base changed",
            extra=log.fields(generation=state.base_generation, merged=names),
        )


def _wait_until_resident(mix: Mix, cancellation: Cancellation) -> None:
    answer: Future[HostResult] = Future()
    if mix.ensure_host(answer.set_result):
        return
    if not cancellation.wait(answer):
        cancellation.check()
    result = answer.result()
    if result.error is not None:
        raise result.error


def _operators(mix: Mix) -> list[tuple[AdapterOperators, float]]:
    found = []
    for adapter, weight in mix.members:
        assert adapter.operators is not None, "a held adapter stays resident"
        found.append((adapter.operators, weight))
    return found


def _check_mergeable(mix: Mix) -> None:
    reasons = []
    for adapter, _ in mix.members:
        assert adapter.operators is not None, "a held adapter stays resident"
        beyond = beyond_updates(adapter.operators)
        if adapter.facts.vocab_size:
            beyond += ("vocabulary",)
        if beyond:
            method, parts = adapter.facts.method, " and ".join(beyond)
            text = say("NOT_MERGEABLE", adapter=adapter.name, method=method, parts=parts)
            reasons.append(("adapters", text))
    refuse_all(reasons)


def _build_edit(
    edit: Edit,
    base: BaseModel,
    mix: Mix,
    cancellation: Cancellation,
    *,
    most_error: float = float("inf"),
) -> MergeReport | None:
    """Stores every changed module in ``edit``. Gives up if ``update_error`` is over ``most_error``.

    The limit applies from ``_TRIAL_MODULES`` modules on, because a single module is not typical.

    Returns:
        The difference between the stored and the exact weights; None if it is over the limit.

    Raises:
        InvalidRequestError: Merged weights are not finite. The error lists all modules with such
            weights.
        TurretError: The one that ``cancellation`` was set with.
    """
    compute_on_this_thread()
    members = _operators(mix)
    errors: list[tuple[str, float]] = []
    squares = {"error": 0.0, "exact": 0.0, "update": 0.0}
    overflown = []
    for path, module in base.modules.items():
        cancellation.check()
        ops = [(o.modules[path], weight) for o, weight in members if path in o.modules]
        if not ops:
            continue
        biases = [o.bias * factor for o, factor in ops if o.bias is not None]
        if biases:
            edit.put_bias(path, torch.stack(biases).sum(0))
        weight = module.dequantize()
        exact = weight.clone()
        for operators, factor in ops:
            add_delta(exact, operators, module, factor)
        update = frobenius_norm(exact - weight)
        del weight
        if update == 0.0:
            continue  # Quantising the unchanged weight again would change it.
        stored = edit.put_weight(path, exact)
        if not bool(torch.isfinite(stored).all()):
            overflown.append(path)
            continue
        size, error = frobenius_norm(exact), frobenius_norm(stored - exact)
        errors.append((path, error / size))
        squares["error"] += error**2
        squares["exact"] += size**2
        squares["update"] += update**2
        is_over = _ratio(squares["error"], squares["update"]) > most_error
        if is_over and len(errors) >= _TRIAL_MODULES:
            return None
    if overflown:
        refuse_all([("adapters", say("MERGE_OVERFLOWS", module=path)) for path in overflown])
    if _ratio(squares["error"], squares["update"]) > most_error:
        return None
    edit.join()
    return MergeReport(
        relative_error=_ratio(squares["error"], squares["exact"]),
        update_error=_ratio(squares["error"], squares["update"]),
        modules=tuple(errors),
    )


def _ratio(squares: float, reference: float) -> float:
    return (squares / reference) ** 0.5 if reference else 0.0
