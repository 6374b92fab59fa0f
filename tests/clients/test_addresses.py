"""Addresses that cannot be a server's: each error names the fault."""

from __future__ import annotations

import pytest
from said import says
from servers.command import parse_and_run

from turret.clients.channel import Tls
from turret.clients.client import TurretClient
from turret.clients.unreached import address_problem

WRONG = {
    "localhost:": "ADDRESS_WITHOUT_PORT",
    "dns:localhost:": "ADDRESS_WITHOUT_PORT",
    "dns:///localhost:": "ADDRESS_WITHOUT_PORT",
    "": "ADDRESS_WITHOUT_PORT",
    "localhost:abc": "PORT_NOT_IN_RANGE",
    "localhost:5x": "PORT_NOT_IN_RANGE",
    ":": "ADDRESS_WITHOUT_HOST",
    ":50051": "ADDRESS_WITHOUT_HOST",
    "[]:1": "ADDRESS_WITHOUT_HOST",
    " localhost:1": "ADDRESS_WITH_SPACE",
    "localhost:1\n": "ADDRESS_WITH_SPACE",
    "a b:1": "ADDRESS_WITH_SPACE",
    "HTTPS://a:1": "ADDRESS_WITH_SCHEME",
    "tcp://a:1": "ADDRESS_WITH_SCHEME",
    "127.0.0.1:1,127.0.0.1:2": "ADDRESS_LIST",
    "unix:": "SCHEME_WITHOUT_PATH",
    "unix://": "SCHEME_WITHOUT_PATH",
    "ipv4:": "SCHEME_WITHOUT_ADDRESS",
    "dns:///": "SCHEME_WITHOUT_ADDRESS",
}


@pytest.mark.parametrize(("address", "reason"), WRONG.items(), ids=map(repr, WRONG))
def test_an_address_that_is_none_is_refused(
    address: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    said = address_problem(address, has_tls=False)
    assert said is not None
    assert said.reason == reason
    for tls in (None, Tls()):
        for name in ("address", "admin_address"):
            with pytest.raises(ValueError, check=says(reason)) as raised:
                TurretClient(tls=tls, **{name: address})  # type: ignore[arg-type]
            assert str(raised.value) == f"{name}: {said}"
    for verb in (["health"], ["generate", "a"]):
        assert parse_and_run(*verb, "--address", address) == 2
        assert capsys.readouterr().err == f"error: --address: {said}\n"


def test_a_path_may_hold_a_blank_and_a_port_be_a_services_name():
    TurretClient("unix:/a b").close()
    TurretClient("localhost:http").close()
    TurretClient("localhost:https", tls=Tls()).close()
