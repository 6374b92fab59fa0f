"""The fleets of a machine, the state directory of each, and the cleanup after dead ones."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from turret.fleet.config import FleetConfig
from turret.fleet.protocol import FleetBase, Join, Report
from turret.fleet.registry_host import FleetStore, RegistryHost
from turret.fleet.serving import fleet_folder
from turret.fleet.serving.fleet_folder import FleetFolder
from turret.fleet.serving.ingress import ingress_environment
from turret.fleet.serving.ray_cluster import CLUSTER_FILE, RayCluster
from turret.fleet.words import say
from turret.server import cli
from turret.server.adapters.state_dir import StateDir

_COMMAND = """
import os, sys, time
from pathlib import Path
from turret.fleet.serving import fleet_folder
from turret.fleet.serving.fleet_folder import FleetFolder
fleet_folder._SHORT = Path(os.environ["TMPDIR"])
print(FleetFolder.make(Path(sys.argv[1])).path, flush=True)
time.sleep(600)
"""
_INGRESS = """
import socket, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
time.sleep(600)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for fleets' folders, used only by this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(fleet_folder, "_SHORT", folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name == "ray" else find(name)
    )
    return folder


@contextmanager
def running(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a Python program; returns it and its first line."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


class Killed:
    """A fleet with a killed command and a running ingress."""

    def __init__(self, at: Path, stack: ExitStack) -> None:
        with running(sys.executable, "-c", _COMMAND, at / "state") as (_, folder):
            self.folder = Path(folder)
        self.ingress, port = start_ingress(at, self.folder, stack)
        self.address = f"127.0.0.1:{port}"


def start_ingress(at: Path, folder: Path, stack: ExitStack) -> tuple[subprocess.Popen[str], str]:
    """Start a program that looks like the ingress of the folder's fleet.

    Returns it and its port.
    """
    at.mkdir()
    program = at / "haproxy"
    program.symlink_to(sys.executable)
    file = f"{folder}/node/haproxy.cfg"
    return stack.enter_context(running(program, "-c", _INGRESS, "-f", file))


@pytest.mark.parametrize("length", [13, 14])
def test_a_temporary_folder_with_a_long_path_is_not_used(
    length: int, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet's folder contains sockets, and HAProxy limits their paths to 97 bytes."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    place = Path(f"/tmp/{'x' * (length - len('/tmp/'))}")
    made.rename(place)
    try:
        monkeypatch.setattr("tempfile.tempdir", str(place))
        folder = FleetFolder.make(tmp_path / "state")
        assert folder.path.parent == (place if length == 13 else temporary)
        sockets = [
            path
            for name, path in ingress_environment(folder.path / ("f" * 56)).items()
            if name.endswith("SOCKET_PATH")
        ]
        assert length == 14 or max(map(len, sockets)) == 97
        # A command with another directory for temporary files also finds it.
        assert fleet_folder.state_dirs() == [tmp_path / "state"]
        folder.remove()
    finally:
        place.rmdir()


def test_a_fleet_is_found_while_its_command_lives(tmp_path: Path) -> None:
    assert fleet_folder.state_dirs() == []
    one, other = tmp_path / "one", tmp_path / "other"
    folder = FleetFolder.make(one)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with running(sys.executable, "-c", _COMMAND, other):
        assert fleet_folder.state_dirs() == [one, other]
    assert fleet_folder.state_dirs() == [one]
    folder.remove()
    assert fleet_folder.state_dirs() == []
    assert not folder.path.exists()


def test_files_of_a_killed_fleet_are_removed_and_those_of_a_live_one_kept(
    tmp_path: Path, temporary: Path
) -> None:
    # The folder of joined clusters, and a file: both have no owner.
    joined = temporary / f"turret-{os.getuid()}"
    joined.mkdir()
    (temporary / "turret-file").touch()
    living = FleetFolder.make(tmp_path / "state")
    with ExitStack() as stack:
        own, _ = start_ingress(tmp_path / "living", living.path, stack)
        killed = Killed(tmp_path / "killed", stack)
        assert fleet_folder.remove_dead() == [killed.folder]
        assert killed.ingress.wait(10) == -signal.SIGKILL
        assert not killed.folder.exists()
        assert joined.exists()
        assert fleet_folder.remove_dead() == []
        assert own.poll() is None
        living.remove()
        assert own.wait(10) == -signal.SIGKILL


def test_a_fleet_starts_on_the_addresses_of_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turret.fleet.serving.serve.run", lambda config: 7)
    with socket.create_server(("127.0.0.1", 0)) as free:
        http = f"127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as stack:
        killed = Killed(tmp_path / "killed", stack)
        flags = ["--state-dir", str(tmp_path / "state"), "--address", killed.address]
        assert cli.main(["cluster", "serve", *flags, "--http-address", http]) == 7


def test_status_reports_the_running_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    folder = FleetFolder.make(one)
    assert cli.main(["cluster", "status"]) == 1
    assert say("FLEET_STARTING", state_dir=one) in capsys.readouterr().err
    with running(sys.executable, "-c", _COMMAND, other):
        assert cli.main(["cluster", "status"]) == 1
    several = say("FLEETS_MANY", count=2, state_dirs=f"{one}, {other}")
    assert several in capsys.readouterr().err
    folder.remove()
    assert cli.main(["cluster", "status", "--state-dir", str(one)]) == 1
    assert say("FLEET_MISSING", state_dir=one) in capsys.readouterr().err


def test_a_fleet_without_the_state_directory_leaves_the_file_of_the_one_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: None))
    found = {"gcs_address": "127.0.0.1:1"}
    monkeypatch.setattr(RayCluster, "_open", staticmethod(lambda *_: found))
    clusters = []
    for token in ("first", "second"):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        clusters.append(RayCluster.open(FleetConfig(), "127.0.0.1", tmp_path, lambda: False))
        if token == "first":
            clusters[0].publish(tmp_path)
    path = tmp_path / CLUSTER_FILE
    published = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    clusters[1].close(tmp_path)
    assert path.read_bytes() == published
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    clusters[0].close(tmp_path)
    assert not path.exists()


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
