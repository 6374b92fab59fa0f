"""The state directory of a fleet belongs to one registry, which runs on a clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from turret.fleet.protocol import FleetBase, Join, Report
from turret.fleet.registry_host import FleetStore, RegistryHost
from turret.server.adapters.state_dir import StateDir


def test_a_second_registry_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = FleetStore(tmp_path)
    first.write_base(FleetBase())
    saved = sorted(tmp_path.rglob("*"))
    for second in (lambda: FleetStore(tmp_path), lambda: StateDir(tmp_path, 0)):
        with pytest.raises(ValueError, match=str(tmp_path)):
            second()
    assert sorted(tmp_path.rglob("*")) == saved
    first.close()
    again = FleetStore(tmp_path)
    assert again.read_base() == FleetBase()
    again.close()


def test_a_lease_counts_from_the_report_and_not_from_its_late_answer(tmp_path: Path) -> None:
    store = FleetStore(tmp_path)
    host = RegistryHost(store, lease_seconds=0.8)
    began = time.monotonic()
    joined = host.join(Join(replica="r", base_name="m", base_digest="d" * 64))
    report = Report(replica="r", session=joined.session, received=0, applied=0)
    # Nothing changes, so the answer comes after the whole wait; the replica has died meanwhile.
    assert host.report(report, 0.8).entries == ()
    assert len(host.status().replicas) == 1
    time.sleep(began + 1.4 - time.monotonic())
    assert host.status().replicas == ()
    host.close()
    store.close()
