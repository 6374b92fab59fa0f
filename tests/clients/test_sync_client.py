"""The synchronous client is what its generator makes of the asyncio client."""

from __future__ import annotations

import pytest
from sync_client import CLIENTS, FILES, rendered


@pytest.mark.parametrize("source", FILES)
def test_the_synchronous_client_is_current(source: str):
    assert (CLIENTS / FILES[source]).read_text() == rendered(source), "run `make client`"
