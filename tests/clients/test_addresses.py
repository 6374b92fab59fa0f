"""Addresses at which there can be no server: refused by what is wrong with them."""

from __future__ import annotations

import re

import pytest
from servers.command import parse_and_run

from turret.clients.channel import Tls
from turret.clients.client import TurretClient

NO_PORT = "is not HOST:PORT; the port is missing"
WRONG = {
    "localhost:": NO_PORT,
    "dns:localhost:": NO_PORT,
    "dns:///localhost:": NO_PORT,
    "": NO_PORT,
    "localhost:abc": "is not HOST:PORT with a port from 0 to 65535",
    "localhost:5x": "is not HOST:PORT with a port from 0 to 65535",
    ":": "is not HOST:PORT; the host is missing",
    ":50051": "is not HOST:PORT; the host is missing",
    "[]:1": "is not HOST:PORT; the host is missing",
    " localhost:1": "is not HOST:PORT; it contains white space",
    "localhost:1\n": "is not HOST:PORT; it contains white space",
    "a b:1": "is not HOST:PORT; it contains white space",
    "HTTPS://a:1": "is not HOST:PORT; leave out HTTPS://",
    "tcp://a:1": "is not HOST:PORT; leave out tcp://",
    "127.0.0.1:1,127.0.0.1:2": "is not HOST:PORT; start a list of addresses with ipv4: or ipv6:",
    "unix:": "unix: requires a path, such as unix:/run/turret.sock",
    "unix://": "unix: requires a path, such as unix:/run/turret.sock",
    "ipv4:": "ipv4: requires an address",
    "dns:///": "dns: requires an address",
}


@pytest.mark.parametrize(("address", "problem"), WRONG.items(), ids=map(repr, WRONG))
def test_an_address_that_is_none_is_refused(
    address: str, problem: str, capsys: pytest.CaptureFixture[str]
):
    said = problem if "requires" in problem else f"{address!r} {problem}"
    for tls in (None, Tls()):
        for name in ("address", "admin_address"):
            with pytest.raises(ValueError, match=re.escape(said)) as raised:
                TurretClient(tls=tls, **{name: address})  # type: ignore[arg-type]
            assert str(raised.value) == f"{name}: {said}"
    for verb in (["health"], ["generate", "a"]):
        assert parse_and_run(*verb, "--address", address) == 2
        assert capsys.readouterr().err == f"error: --address: {said}\n"


def test_a_path_may_hold_a_blank_and_a_port_be_a_services_name():
    TurretClient("unix:/a b").close()
    TurretClient("localhost:http").close()
    TurretClient("localhost:https", tls=Tls()).close()
