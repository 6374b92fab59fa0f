"""``turret cluster status``: the fleet as its registry sees it."""

from __future__ import annotations

from turret.server.basics.counted import counted
from turret.server.cluster.messages import FleetStatus


def shown(status: FleetStatus) -> str:
    """A few lines for a person."""
    base = status.base
    merged = "" if base.merge is None else ", ".join(member.name for member in base.merge.members)
    lines = [
        f"registry  revision {status.revision}, {counted(status.num_adapters, 'adapter')}, base"
        f" generation {base.generation}" + (f" (merged: {merged})" if merged else ""),
        f"{'replica':<12}{'revision':>9}{'lease':>8}{'running':>9}{'waiting':>9}"
        f"{'in host':>9}{'on device':>11}",
    ]
    lines += [
        f"{replica.name:<12}{replica.revision:>9}{replica.lease_seconds:>7.1f}s"
        f"{replica.running:>9}{replica.waiting:>9}"
        f"{replica.num_host:>9}{replica.num_device:>11}"
        for replica in status.replicas
    ]
    return "\n".join(lines)
