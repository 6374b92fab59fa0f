"""A registered adapter, domain to proto."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.adapter_info import AdapterInfo

RESIDENCIES = {
    "disk": adapters_pb2.Adapter.DISK,
    "host": adapters_pb2.Adapter.HOST,
    "device": adapters_pb2.Adapter.DEVICE,
}


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no message can hold.

    Reading refuses such text, but a state directory may hold what an earlier version let in.
    """
    return text.encode("utf-8", "replace").decode()


def adapter_message(record: AdapterInfo) -> adapters_pb2.Adapter:
    """A registry record, as the API shows it."""
    facts = record.facts
    message = adapters_pb2.Adapter(
        name=record.name,
        uuid=record.uuid,
        generation=record.generation,
        digest=_sendable(facts.digest),
        method=_sendable(facts.method),
        ranks=facts.ranks,
        target_modules=map(_sendable, facts.target_modules),
        bytes_disk=facts.bytes_disk,
        bytes_host=record.bytes_host,
        bytes_device=record.bytes_device,
        residency=RESIDENCIES[record.residency],
        pinned=record.pinned,
        in_flight=record.in_flight,
        base_model=_sendable(facts.base_model),
        warnings=map(_sendable, record.warnings),
        state=record.state,
        source=_sendable(record.source),
        invocation_token_ids=facts.invocation,
        labels=map(_sendable, facts.labels),
        vocab_size=facts.vocab_size,
    )
    if record.last_used_time is not None:
        stamp = timestamp_pb2.Timestamp()
        stamp.FromNanoseconds(round(record.last_used_time * 1e9))
        message.last_used_time.CopyFrom(stamp)
    return message
