"""``turret cluster serve`` with real replicas on Ray Serve.

These tests need Ray and take minutes.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from builders.adapters import edit_config
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from fleets.serving import ServingFleet, listening, start_fleet, status_rows
from safetensors.torch import load_file, save_file
from servers import raw_grpc
from servers.probe import is_serving

from turret.clients.client import TurretClient, TurretRpcError
from turret.clients.requests import AdapterWeight

pytest.importorskip("ray")
pytestmark = pytest.mark.long


LOOPBACK = "127.0.0.1"
# Another address of this machine, to distinguish the ingress from the replicas.
HOST = "127.0.0.3" if sys.platform == "linux" else LOOPBACK


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingFleet]:
    flags = ("--replicas", "2", "--keep-generations", "1")
    with start_fleet(tmp_path_factory.mktemp("fleet"), *flags, host=HOST) as started:
        yield started


def test_the_fleet_listens_only_on_configured_hosts_and_loopback(fleet: ServingFleet) -> None:
    # A reload of the ingress may replace its process between the two samples of one round.
    end = time.monotonic() + 10.0
    ingress: set[str] = set()
    while {fleet.address, fleet.http_address} - ingress:
        assert time.monotonic() < end, ingress
        found = {each: listening(each) for each in fleet.tree()}
        pairs = {pair for pairs in found.values() for pair in pairs}
        # The command, its GCS and raylet, two replicas, and other processes.
        assert sum(map(bool, found.values())) >= 8
        assert {host for host, _ in pairs} <= {HOST, LOOPBACK}, found
        ingress = {f"{host}:{port}" for host, port in pairs if host == HOST}
    if HOST != LOOPBACK:
        assert ingress == {fleet.address, fleet.http_address}


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("haproxy", 5.0),
        ("ray::HAProxyManager", 20.0),
        ("ray::ProxyActor", 0.0),
        ("ray::ServeController", 0.0),
    ],
)
def test_a_killed_ingress_process_is_restarted(
    fleet: ServingFleet, name: str, seconds: float
) -> None:
    """Requests fail for at most ``seconds`` after the process is killed."""

    def get() -> int:
        with urllib.request.urlopen(f"http://{fleet.http_address}/health", timeout=10) as answer:
            return int(answer.status)

    assert get() == 200
    dying = fleet.named(name)
    # HAProxy ends with the process that runs it, and answers until then.
    ending = dying + (fleet.named("haproxy") if name == "ray::HAProxyManager" else [])
    for each in dying:
        each.kill()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(ending, timeout=10.0)
    assert not alive
    while True:
        try:
            assert get() == 200
            break
        except OSError:
            assert time.monotonic() < killed + seconds
            time.sleep(0.05)
    with TurretClient(fleet.address) as client:
        assert client.generate("Once", max_tokens=2, temperature=0).text
    while not fleet.named(name):
        assert time.monotonic() < killed + 60.0
        time.sleep(0.2)


def test_changes_apply_to_every_later_request_on_any_replica(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address) as client:
        uuid = client.adapters.load("sql", "sql").uuid
        for _ in range(20):
            found = client.adapters.get("sql")
            assert (found.uuid, found.generation) == (uuid, 1)
        assert client.adapters.replace("sql", "json", expected_generation=1).generation == 2
        used = [
            client.generate("Once", adapters=["sql"], max_tokens=2, temperature=0)
            for _ in range(10)
        ]
        assert {(u.uuid, u.generation) for answer in used for u in answer.adapters_used} == {
            (uuid, 2)
        }
        client.adapters.unload("sql")
        for _ in range(10):
            with pytest.raises(TurretRpcError):
                client.adapters.get("sql")
    assert fleet.status().count("\n") >= 3


def test_versions_and_aliases_apply_on_any_replica(fleet: ServingFleet) -> None:
    def used(model: str) -> set[int]:
        """The generations that requests for a model get over HTTP, where replicas take turns."""
        answers = [completed(fleet, model, "Once", 1) for _ in range(8)]
        return {use["generation"] for answer in answers for use in answer["adapters_used"]}

    def dates(generation: int) -> AdapterWeight:
        return AdapterWeight("dates", generation=generation)

    with TurretClient(fleet.address) as client:
        client.adapters.load("dates", "sql")
        client.adapters.set_alias("prod", "dates")
        client.adapters.replace("dates", "json")
        assert (used("dates"), used("dates@1"), used("prod")) == ({2}, {1}, {1})
        client.adapters.rollback("dates")
        assert (used("dates"), used("dates@2")) == ({1}, {2})
        client.adapters.set_alias("prod", [dates(1), dates(2)])
        assert used("prod") <= {1, 2}
        client.adapters.set_alias("prod", [dates(2)])
        assert used("prod") == {2}
        client.adapters.delete_alias("prod")
        client.adapters.unload("dates")


def test_error_details_arrive_complete(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address, max_retries=0) as client:
        with pytest.raises(TurretRpcError) as unary:
            client.generate("Once", adapters=["nobody"], max_tokens=1)
        with pytest.raises(TurretRpcError) as streamed:
            list(client.generate_stream("Once", adapters=["nobody"], max_tokens=1))
        with pytest.raises(TurretRpcError) as invalid:
            client.generate("Once", max_tokens=1, temperature=-1)
    for error in (unary.value, streamed.value):
        assert error.reason == "ADAPTER_NOT_FOUND"
        assert error.metadata == {"adapters": "nobody"}
    assert {each.field for each in invalid.value.violations} >= {"temperature"}


def test_large_messages_are_rejected_before_they_are_in_memory(fleet: ServingFleet) -> None:
    """If a handler had read the messages, the errors would have details."""
    message = b"\x0a\x80\x80\x80\x20" + b"x" * (64 << 20)
    for method in ("turret.v1.Inference/Generate", "grpc.health.v1.Health/Check"):
        with grpc.insecure_channel(
            fleet.address, [("grpc.max_send_message_length", -1)]
        ) as channel:
            call = channel.unary_unary(f"/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(message, timeout=60)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        told = caught.value.trailing_metadata() or ()
        assert all(each[0] != "grpc-status-details-bin" for each in told)  # type: ignore[index]


def test_parts_of_messages_take_a_bounded_amount_of_memory(fleet: ServingFleet) -> None:
    """The parts of 4 × 100 messages of 4 MiB, of which 64 arrive at a replica at the same time."""

    def held() -> int:
        return sum(each.memory_info().rss for each in fleet.replicas())

    before, after = held(), []

    def send(_: int) -> None:
        # The ingress stops reading from a connection whose calls wait.
        with contextlib.suppress(TimeoutError):
            raw_grpc.accepted_bytes(
                fleet.address, "/turret.v1.Inference/Generate", (), 100, (4 << 20) - 16, 3.0
            )

    sample = threading.Event()

    def watch() -> None:
        while not sample.wait(0.2):
            after.append(held())

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(4) as senders:
        list(senders.map(send, range(4)))
    sample.set()
    watching.join()
    assert max(after) - before < 700 << 20


def test_a_request_whose_headers_never_end_is_timed_out(fleet: ServingFleet) -> None:
    host, _, port = fleet.http_address.rpartition(":")
    with socket.create_connection((host, int(port)), 30.0) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        began = time.monotonic()
        # HAProxy answers with status 408.
        while connection.recv(1000):
            pass
        assert time.monotonic() - began < 20.0


def test_http_requests_are_answered_too(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address) as client:
        client.adapters.load("label", "label")
    for _ in range(4):
        assert completed(fleet, "label", "Once", 3)["model"] == "label"
    with urllib.request.urlopen(f"http://{fleet.http_address}/health", timeout=10) as answer:
        assert answer.status == 200


def test_a_list_of_addresses_is_treated_as_one_server(fleet: ServingFleet) -> None:
    # The ingresses of two machines have two addresses; here, one ingress has two names.
    listed = f"ipv4:{fleet.address},{fleet.address}"
    with TurretClient(listed, max_retries=0) as client:
        assert client.generate("Once", max_tokens=2, temperature=0).text
        assert "".join(chunk.text for chunk in client.generate_stream("Once", max_tokens=2))


def test_each_replica_has_metrics_of_its_own(fleet: ServingFleet) -> None:
    host, _, port = fleet.metrics_address.rpartition(":")
    near = range(int(port), int(port) + 16)
    found = [
        f"{host}:{each.laddr.port}"
        for replica in fleet.replicas()
        for each in replica.net_connections()
        if not each.raddr and each.laddr.port in near
    ]
    assert len(set(found)) == len(fleet.replicas()) == 2
    with TurretClient(fleet.address, max_retries=0) as client:
        before = sum(map(generated, found))
        client.generate("Once upon a time", max_tokens=5, temperature=0)
        assert sum(map(generated, found)) == before + 5


def generated(metrics_address: str) -> float:
    """The number of tokens that the replica with these metrics has generated."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^turret_generated_tokens_total\{.*\} (\S+)$", text, re.M)
    return sum(map(float, found))


def completed(fleet: ServingFleet, model: str, prompt: str, max_tokens: int) -> Any:
    """A completion over HTTP without a mix, so replicas take turns."""
    asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://{fleet.http_address}/v1/completions",
        json.dumps(asked).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def everywhere(fleet: ServingFleet, model: str) -> str:
    """The answer of every replica, which must be the same."""
    answers = [completed(fleet, model, "Once upon a time", 12) for _ in range(6)]
    (text,) = {answer["choices"][0]["text"] for answer in answers}
    return text


def test_vectors_and_labels_are_the_same_on_every_replica(
    fleet: ServingFleet, tmp_path: Path
) -> None:
    arch = arch_of(None)
    write_adapter(tmp_path, arch, AdapterSpec("topics", 4), seed=2)
    tensors = load_file(tmp_path / "topics" / "adapter_model.safetensors")
    head = torch.randn((3, arch.hidden_size), generator=torch.Generator().manual_seed(3))
    tensors["base_model.model.score.weight"] = head
    save_file(tensors, tmp_path / "topics" / "adapter_model.safetensors")
    edit_config(tmp_path / "topics", task_type="SEQ_CLS", modules_to_save=["score"])
    texts = [f"number {number}" for number in range(70)]
    with TurretClient(fleet.address, timeout=300.0) as client:
        client.adapters.upload("topics", tmp_path / "topics")
        plain = {client.embed(texts[:3]).vectors for _ in range(4)}
        adapted = client.embed(texts, adapters="topics", pooling="mean", dimensions=8)
        (vectors,) = plain
        assert [len(vector) for vector in vectors] == [arch.hidden_size] * 3
        assert [len(vector) for vector in adapted.vectors] == [8] * len(texts)
        found = [client.classify(texts, adapters="topics") for _ in range(2)]
        assert found[0].labels == found[1].labels
        assert len(found[0].labels) == len(texts)
        with pytest.raises(TurretRpcError) as refused:
            client.classify("a", adapters="nobody")
        assert refused.value.reason == "ADAPTER_NOT_FOUND"
        client.adapters.unload("topics")


def test_a_fusion_is_made_by_one_replica_and_served_by_all(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address, timeout=300.0) as client:
        for name in ("sql", "pirate"):
            client.adapters.load(name, name)
        fused = client.adapters.fuse("both", ["sql", ("pirate", 0.5)])
        assert fused.adapter.method == "lora"
        mix = client.generate(
            "Once upon a time", adapters=["sql", ("pirate", 0.5)], max_tokens=12, temperature=0
        )
        assert everywhere(fleet, "both") == mix.text
        again = client.adapters.get("both")
        assert (again.uuid, again.generation) == (fused.adapter.uuid, 1)
        client.adapters.unload("both")
        with pytest.raises(TurretRpcError):
            client.generate("Once", adapters=["both"], max_tokens=1)
    assert not list((fleet.state_dir / "files").iterdir())


def test_a_merge_applies_to_current_and_later_replicas(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address, timeout=600.0, max_retries=20) as client:
        client.adapters.load("sql", "sql")
        plain = everywhere(fleet, "base")
        state = client.adapters.merge("sql")
        merged = everywhere(fleet, "base")
        assert merged != plain
        assert "merged: sql@1=1" in fleet.status()
        with pytest.raises(TurretRpcError) as refused:
            client.adapters.unload("sql")
        assert refused.value.reason == "ADAPTER_MERGED"
        fleet.replicas()[0].kill()
        fleet.wait_until_whole(2)
        assert everywhere(fleet, "base") == merged
        assert client.adapters.get_merge_state().base_generation == state.base_generation
        after = client.adapters.unmerge()
        assert after.base_generation == state.base_generation + 1
        assert everywhere(fleet, "base") == plain


def test_health_is_reported_for_each_service(fleet: ServingFleet) -> None:
    assert is_serving(fleet.address) == (True, "SERVING")
    assert is_serving(fleet.address, "turret.v1.Inference") == (True, "SERVING")
    assert is_serving(fleet.address, "turret.v1.Nobody") == (False, "NOT_FOUND")


def test_a_killed_replica_loses_no_answer_and_comes_back_with_everything(
    fleet: ServingFleet,
) -> None:
    """One replica is killed during six streams: all are complete, with unchanged bits."""
    with TurretClient(fleet.address, max_retries=20) as client:
        for name in ("sql", "json", "label"):
            client.adapters.load(name, name)
        names = ["sql", "json", "label"] * 2

        def answer(name: str) -> str:
            chunks = client.generate_stream(
                "Once upon a time", adapters=[name], max_tokens=80, temperature=0, ignore_eos=True
            )
            return "".join(chunk.text for chunk in chunks)

        wanted = [answer(name) for name in names]
        got: dict[int, str] = {}

        def run(index: int) -> None:
            got[index] = answer(names[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(names))]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        fleet.replicas()[0].kill()
        for thread in threads:
            thread.join(120.0)
        assert [got.get(index) for index in range(len(names))] == wanted
        fleet.wait_until_whole(2)
        revisions = {row["revision"] for row in status_rows(fleet.status())}
        assert len(revisions) == 1
        assert [answer(name) for name in names] == wanted


def test_a_mix_stays_on_one_replica(fleet: ServingFleet) -> None:
    names = [f"mix{number}" for number in range(12)]
    with TurretClient(fleet.address) as client:
        for name in (*names, "once"):
            client.adapters.load(name, "sql")
        for _ in range(3):
            for name in names:
                client.generate("Once", adapters=[name], max_tokens=1)
        # One request puts ``once`` on one replica, regardless of routing.
        client.generate("Once", adapters=["once"], max_tokens=1)
        # The usage of the other replica is known up to three seconds later.
        end = time.monotonic() + 10.0
        while any(client.adapters.get(name).residency == "disk" for name in (*names, "once")):
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(4.0)
        # An adapter on both replicas would take twice the memory.
        one = client.adapters.get("once").bytes_host
        assert {client.adapters.get(name).bytes_host for name in names} == {one}
        rows = status_rows(fleet.status())
        assert all(int(row["in host"]) >= 2 for row in rows), rows
        for name in (*names, "once"):
            client.adapters.unload(name)


def test_a_killed_registry_blocks_only_changes_and_forgets_nothing(fleet: ServingFleet) -> None:
    with TurretClient(fleet.address, max_retries=0) as client:
        uuid = client.adapters.load("sql", "sql").uuid
        fleet.registry().kill()
        refused: set[str] = set()
        end = time.monotonic() + 60.0
        while True:
            # Existing adapters are served during this time.
            client.generate("Once", adapters=["sql"], max_tokens=1)
            try:
                client.adapters.load("pirate", "pirate")
                break
            except TurretRpcError as error:
                refused.add(error.reason)
            assert time.monotonic() < end
        assert refused == {"UNAVAILABLE"}
        assert client.adapters.get("sql").uuid == uuid


def test_a_large_upload_passes(fleet: ServingFleet, tmp_path: Path) -> None:
    write_adapter(tmp_path, arch_of(None), AdapterSpec("large", 64, ALL), seed=1)
    folder = tmp_path / "large"
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size > 30 << 20
    with TurretClient(fleet.address, timeout=300.0) as client:
        uploaded = client.adapters.upload("large", folder)
        for _ in range(4):
            assert client.adapters.get("large").digest == uploaded.digest
        client.generate("Once", adapters=["large"], max_tokens=1)
        client.adapters.unload("large")
    assert not list((fleet.state_dir / "files").iterdir())
