"""The state directory of a fleet belongs to one registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from turret.fleet.protocol import Base
from turret.fleet.registry_host import FleetStore
from turret.server.adapters.state_dir import StateDir


def test_a_second_registry_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = FleetStore(tmp_path)
    first.write_base(Base())
    saved = sorted(tmp_path.rglob("*"))
    for second in (lambda: FleetStore(tmp_path), lambda: StateDir(tmp_path, 0)):
        with pytest.raises(ValueError, match=str(tmp_path)):
            second()
    assert sorted(tmp_path.rglob("*")) == saved
    first.close()
    again = FleetStore(tmp_path)
    assert again.read_base() == Base()
    again.close()
