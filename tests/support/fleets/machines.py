"""Simulated machines on one network: network namespaces that can be disconnected. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PREFIX_LENGTH = 24


@dataclass(frozen=True, slots=True)
class Machine:
    """A simulated machine.

    Attributes:
        namespace: The namespace of its network.
        ip: The address, which this process can reach.
        port: The machine's port of the switch.
    """

    namespace: str
    ip: str
    port: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs a command on this machine."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


class Network:
    """Machines behind a switch; this process is connected to it, too."""

    def __init__(self, count: int) -> None:
        number = os.getpid() % 250 + 1
        self._switch = f"turret{os.getpid()}"
        self._near = f"turret{os.getpid()}"
        self.machines = [
            Machine(f"{self._switch}-{index}", f"10.99.{number}.{index}", f"port{index}")
            for index in range(1, count + 1)
        ]
        self._own_ip = f"10.99.{number}.254"

    def open(self) -> None:
        """Create the network.

        Raises:
            OSError: The network cannot be created here.
        """
        switch = self._switch
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for each in self.machines:
            _ip("netns", "add", each.namespace)
            _ip("-n", each.namespace, "link", "set", "lo", "up")
            self._plug(each.port, "eth0", each.namespace)
            _address(each.ip, "eth0", "-n", each.namespace)
        self._plug("port0", self._near, None)
        _address(self._own_ip, self._near)

    def _plug(self, port: str, name: str, namespace: str | None) -> None:
        where = ["netns", namespace or str(os.getpid())]
        _ip(
            *("-n", self._switch, "link", "add", port, "type", "veth"),
            *("peer", "name", name, *where),
        )
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")

    def silence(self, machine: Machine) -> None:
        """Drop all packets to and from a machine, without a notification."""
        _ip("-n", self._switch, "link", "set", machine.port, "nomaster")

    def close(self) -> None:
        """Remove the network."""
        with contextlib.suppress(OSError):
            _ip("link", "del", self._near)
        for namespace in (self._switch, *(each.namespace for each in self.machines)):
            with contextlib.suppress(OSError):
                _ip("netns", "del", namespace)


def _address(ip: str, name: str, *where: str) -> None:
    _ip(*where, "addr", "add", f"{ip}/{PREFIX_LENGTH}", "dev", name)
    _ip(*where, "link", "set", name, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Machines on a network that is open until the block ends.

    Raises:
        OSError: The network cannot be created here.
    """
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise OSError("network namespaces need root, and iproute2")
    made = Network(count)
    try:
        made.open()
        yield made
    finally:
        made.close()
