"""``turret cluster status``: the fleet as its registry sees it."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from turret.clients.verbs.tables import print_table
from turret.fleet.messages import FleetStatus
from turret.server.basics.counted import counted


def print_status(status: FleetStatus) -> None:
    """Print the fleet's state, and one row per replica."""
    base = status.base
    print(f"registry: revision {status.revision}, {counted(status.num_adapters, 'adapter')}")
    members = () if base.merge is None else base.merge.members
    merged = ", ".join(f"{m.name}@{m.generation}={m.weight:g}" for m in members)
    print(f"base: generation {base.generation}{merged and f', merged: {merged}'}")
    if not status.replicas:
        print("no replica has joined yet; the log of `turret cluster serve` says why")
        return
    table = Table()
    # Fold a long name onto the next line, because a cut one is useless.
    table.add_column("replica", overflow="fold")
    for heading in ("revision", "lease", "running", "waiting", "in host", "on device"):
        table.add_column(heading, justify="right")
    for replica in status.replicas:
        figures = (replica.running, replica.waiting, replica.num_host, replica.num_device)
        lease = f"{replica.lease_seconds:.1f}s"
        table.add_row(
            Text(replica.name), str(replica.revision), lease, *(str(figure) for figure in figures)
        )
    print_table(table)
