"""Addresses that cannot be a server's are rejected before the first call."""

from __future__ import annotations

import pytest
from said import says
from servers.command import parse_and_run

from turret.clients.channel import Tls
from turret.clients.client import TurretClient
from turret.clients.errors import UnavailableError

WRONG = {
    "": "ADDRESS_WITHOUT_PORT",
    "localhost": "ADDRESS_WITHOUT_PORT",
    "http://a:1": "ADDRESS_WITH_SCHEME",
    "HTTPS://a:1": "ADDRESS_WITH_SCHEME",
}
# Faults that gRPC itself finds.
UNREACHED = ["localhost:abc", ":50051", "a b:1", "127.0.0.1:1,127.0.0.1:2", "unix:", "tcp://a:1"]


@pytest.mark.parametrize(("address", "reason"), WRONG.items(), ids=map(repr, WRONG))
def test_an_invalid_address_is_rejected(address: str, reason: str):
    for name in ("address", "admin_address"):
        with pytest.raises(ValueError, check=says(reason)) as raised:
            TurretClient(**{name: address})  # type: ignore[arg-type]
        assert str(raised.value).startswith(f"{name}: ")
    for verb in (["health"], ["generate", "a"]):
        assert parse_and_run(*verb, "--address", address) == 2


@pytest.mark.parametrize("address", UNREACHED)
def test_other_faults_are_reported_by_the_first_call(address: str):
    with (
        TurretClient(address, max_retries=0, timeout=20) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.get_model()
    assert raised.value.reason == "NOT_REACHED"


def test_other_forms_are_left_to_grpc():
    for address in ("unix:/a b", "localhost:http", "dns:///a", "ipv6:[::1]:1", "vsock:2:70000"):
        TurretClient(address).close()
    TurretClient("turret.example.com", tls=Tls()).close()
