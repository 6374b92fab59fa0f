"""An adapter as the whole fleet uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from turret.fleet.messages import Usage
from turret.server.adapters.adapter_info import AdapterInfo

_FASTER = ("disk", "host", "device")


def with_usage(record: AdapterInfo, elsewhere: Sequence[Mapping[str, Usage]]) -> AdapterInfo:
    """A replica's record with what the others do: bytes and requests summed, the fastest tier.

    Args:
        record: Of the replica that is asked.
        elsewhere: By name, what each other replica does.
    """
    used = [usage[record.name] for usage in elsewhere if record.name in usage]
    if not used:
        return record
    times = [each.last_used_time for each in (record, *used) if each.last_used_time is not None]
    return dataclasses.replace(
        record,
        bytes_host=record.bytes_host + sum(each.bytes_host for each in used),
        bytes_device=record.bytes_device + sum(each.bytes_device for each in used),
        residency=max((each.residency for each in (record, *used)), key=_FASTER.index),
        in_flight=record.in_flight + sum(each.in_flight for each in used),
        last_used_time=max(times, default=None),
    )
