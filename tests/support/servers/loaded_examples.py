"""The example adapters on a server under test."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from checkout import ROOT
from servers.server_under_test import ServerUnderTest

from turret.clients.client import TurretClient


@contextlib.contextmanager
def examples_loaded(server: ServerUnderTest, *names: str) -> Iterator[TurretClient]:
    """A client of a server with these example adapters, until the block ends."""
    with TurretClient(server.address) as client, contextlib.ExitStack() as cleaning:
        for name in names:
            folder = server.adapter_root / name
            shutil.copytree(ROOT / "examples" / "adapters" / name, folder)
            cleaning.callback(shutil.rmtree, folder)
            client.adapters.load(name, name)
            cleaning.callback(client.adapters.unload, name)
        yield client
