"""Results of the adapter calls. Fields have the meaning of the same field in ``adapters.proto``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from turret.v1 import adapters_pb2 as pb


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered adapter.

    Attributes:
        name: The name that requests use.
        uuid: Identifies this registration.
        generation: The number of the weights under this registration, counted from 1.
        digest: SHA-256 over the config and tensors, in hex.
        method: The method, such as ``lora``.
        ranks: The distinct ranks of its modules.
        target_modules: The modules that it changes.
        bytes_disk: Size on disk, in bytes.
        bytes_host: Host memory in use, in bytes.
        bytes_device: Device memory in use, in bytes.
        residency: ``DISK``, ``HOST`` or ``DEVICE``.
        pinned: Whether it can be neither evicted nor unloaded.
        in_flight: Number of requests that use it.
        last_used_time: When a request last used it (UTC), or None.
        base_model: The base model in the adapter's config.
        warnings: Possible problems, for people to read.
        state: ``LOADING``, ``ACTIVE`` or ``DELETING``.
        source: The path that it was loaded from, with the commit for the hub; "" if it was
            uploaded or fused.
        invocation_token_ids: The invocation of an aLoRA, which acts from its last occurrence in
            the prompt on; empty for an adapter that acts on every token.
        labels: The labels of its classification head; empty if it has none.
        chat_template: Where the chat template comes from that conversations with it use: one of its
            files, ``request`` if it was loaded with one, ``members`` for a fused adapter; "" if it
            has none and the base's is used.
    """

    name: str
    uuid: str
    generation: int
    digest: str
    method: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    bytes_disk: int
    bytes_host: int
    bytes_device: int
    residency: str
    pinned: bool
    in_flight: int
    last_used_time: datetime | None
    base_model: str
    warnings: tuple[str, ...]
    state: str
    source: str = ""
    invocation_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    chat_template: str = ""

    @classmethod
    def from_proto(cls, proto: pb.Adapter) -> Adapter:
        used = proto.last_used_time if proto.HasField("last_used_time") else None
        return cls(
            name=proto.name,
            uuid=proto.uuid,
            generation=proto.generation,
            digest=proto.digest,
            method=proto.method,
            ranks=tuple(proto.ranks),
            target_modules=tuple(proto.target_modules),
            bytes_disk=proto.bytes_disk,
            bytes_host=proto.bytes_host,
            bytes_device=proto.bytes_device,
            residency=_enum_name(pb.Adapter.Residency, proto.residency),
            pinned=proto.pinned,
            in_flight=proto.in_flight,
            last_used_time=_time(used),
            base_model=proto.base_model,
            warnings=tuple(proto.warnings),
            state=_enum_name(pb.Adapter.State, proto.state),
            source=proto.source,
            invocation_token_ids=tuple(proto.invocation_token_ids),
            labels=tuple(proto.labels),
            chat_template=proto.chat_template,
        )


@dataclass(frozen=True, slots=True)
class ModuleError:
    """The error of one module in a fusion or merge.

    Attributes:
        module: Its full path in the base model.
        relative_error: Frobenius norm of the difference over that of the exact result.
        rank: Rank of the result in this module; 0 for a merge.
    """

    module: str
    relative_error: float
    rank: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """A new adapter that was fused from others.

    Attributes:
        adapter: The new adapter.
        relative_error: Over all modules together: the Frobenius norm of the difference from the
            exact sum over that of the sum.
        modules: The same for each module, in the base model's order.
    """

    adapter: Adapter
    relative_error: float
    modules: tuple[ModuleError, ...]

    @classmethod
    def from_proto(cls, proto: pb.FuseAdaptersResponse) -> Fusion:
        return cls(
            Adapter.from_proto(proto.adapter), proto.relative_error, _module_errors(proto.modules)
        )


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A member of the mix that is merged into the base model.

    Attributes:
        name: The name at the time of the merge.
        uuid: The registration that was merged.
        generation: The generation that was merged.
        weight: Its factor in the mix.
    """

    name: str
    uuid: str
    generation: int
    weight: float


@dataclass(frozen=True, slots=True)
class MergeState:
    """The mix that is merged into the base model.

    Attributes:
        active: Whether a merge is active. If not, only ``base_generation`` is set.
        base_generation: The number of the base model's weights, counted from 1.
        adapters: The mix.
        precision: ``NF4`` or ``BF16``; empty without a merge.
        merge_time: When the merge took effect (UTC).
        relative_error: Rounding error over all modules together.
        modules: The same for each module.
        update_error: The error as a share of the change; at 1 the mix is lost.
    """

    active: bool
    base_generation: int
    adapters: tuple[MergedAdapter, ...]
    precision: str
    merge_time: datetime | None
    relative_error: float
    modules: tuple[ModuleError, ...]
    update_error: float

    @classmethod
    def from_proto(cls, proto: pb.MergeState) -> MergeState:
        precision = _enum_name(pb.MergeAdaptersRequest.Precision, proto.precision)
        return cls(
            proto.active,
            proto.base_generation,
            tuple(MergedAdapter(a.name, a.uuid, a.generation, a.weight) for a in proto.adapters),
            precision if proto.active else "",
            _time(proto.merge_time if proto.HasField("merge_time") else None),
            proto.relative_error,
            _module_errors(proto.modules),
            proto.update_error,
        )


def _module_errors(protos: Iterable[pb.ModuleError]) -> tuple[ModuleError, ...]:
    return tuple(ModuleError(p.module, p.relative_error, p.rank) for p in protos)


def _time(timestamp: timestamp_pb2.Timestamp | None) -> datetime | None:
    return None if timestamp is None else timestamp.ToDatetime(UTC)


def _enum_name(enum: EnumTypeWrapper, value: int) -> str:
    # A newer server may send a value that this client has no name for.
    return enum.Name(value) if value in enum.values() else str(value)
