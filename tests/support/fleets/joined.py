"""Ray on several machines, and a ``turret cluster serve --ray-address auto`` that joins it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from checkout import ROOT
from fleets.machines import Machine, Network
from fleets.serving import wait_for_text

from turret.fleet.serving.ingress import ingress_environment, joined_folder

_STOP_SECONDS = 90.0
GRPC_PORT, HTTP_PORT = 50051, 8080


class JoinedFleet:
    """Ray on every machine of a network, and the commands on the first one."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._folder = folder
        self.network = network
        self.machines = network.machines
        self.state_dir = folder / "state"
        head = self.machines[0]
        self.address = f"{head.ip}:{GRPC_PORT}"
        self.http_address = f"{head.ip}:{HTTP_PORT}"
        self._ray_address = f"{head.ip}:6379"
        self._environment = {
            **os.environ,
            **ingress_environment(joined_folder()),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self._ray_address,
            "PYTHONPATH": str(ROOT / "src"),
        }
        # Use a short path, because the paths of Ray's sockets are long.
        self._ray_folder = tempfile.mkdtemp(prefix="turret-", dir="/tmp")
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_ray(self, machine: Machine) -> subprocess.Popen[bytes]:
        """Start Ray on a machine; Ray must be started on the network's first machine first."""
        flags = ["--num-cpus=1", f"--node-ip-address={machine.ip}", "--block"]
        flags += [f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
        if machine is self.machines[0]:
            flags += ["--head", "--port=6379", "--include-dashboard=false"]
            flags += [f"--temp-dir={self._ray_folder}"]
        else:
            flags += [f"--address={self._ray_address}"]
        ray = str(Path(sys.executable).parent / "ray")
        # Ray would use the cluster in RAY_ADDRESS as its own.
        environment = {k: v for k, v in self._environment.items() if k != "RAY_ADDRESS"}
        process = self._start(machine, [ray, "start", *flags], f"ray-{machine.port}", environment)
        wait_for_text(self._log(f"ray-{machine.port}"), "Ray runtime started", process)
        return process

    def serve(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        """Run the command until it serves.

        Args:
            name: The name of this run.
            flags: Flags in addition to the addresses.
        """
        command = [sys.executable, "-m", "turret.server.cli", "cluster", "serve"]
        command += ["--ray-address", "auto", "--state-dir", str(self.state_dir), *flags]
        # The addresses to listen on come from the environment, as documented in docs/fleet.md.
        environment = {
            **self._environment,
            "TURRET_ADDRESS": f"0.0.0.0:{GRPC_PORT}",
            "TURRET_HTTP_ADDRESS": f"0.0.0.0:{HTTP_PORT}",
            "TURRET_INSECURE": "true",
            "TURRET_HTTP_ALLOWED_HOST": self.machines[0].ip,
        }
        process = self._start(self.machines[0], command, name, environment)
        wait_for_text(self._log(name), "serving.serve serving", process)
        return process

    def log(self, name: str) -> str:
        """The output of a run."""
        return self._log(name).read_text()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def status(self) -> str:
        """The output of ``turret cluster status``."""
        command = [sys.executable, "-m", "turret.server.cli", "cluster", "status"]
        command += ["--ray-address", self._ray_address]
        done = subprocess.run(
            self.machines[0].command(command),
            capture_output=True,
            text=True,
            env=self._environment,
            check=True,
        )
        return done.stdout

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas, on all machines."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_replica = "ray::ServeReplica:turret" in " ".join(process.cmdline())
                token = process.environ().get("RAY_AUTH_TOKEN") if is_replica else None
                if token == self._environment["RAY_AUTH_TOKEN"]:
                    found.append(process)
        return found

    def _start(
        self, machine: Machine, command: Sequence[str], name: str, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as written:
            process = subprocess.Popen(
                machine.command(command), stdout=written, stderr=written, env=environment
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all processes, the latest first."""
        trees = {p.pid: _tree(p.pid) for p in self._processes}
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
        # Processes on a disconnected machine, or started by a dead process.
        for left in (each for tree in trees.values() for each in tree):
            with contextlib.suppress(psutil.Error):
                left.kill()
        shutil.rmtree(self._ray_folder, ignore_errors=True)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


@contextlib.contextmanager
def joined_fleet(network: Network, folder: Path) -> Iterator[JoinedFleet]:
    """Ray on every machine of a network.

    Args:
        network: The machines.
        folder: The directory for logs and the state directory.
    """
    fleet = JoinedFleet(network, folder)
    try:
        for machine in fleet.machines:
            fleet.start_ray(machine)
        yield fleet
    finally:
        fleet.close()
