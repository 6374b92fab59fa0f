"""A real server with versions of an adapter: rollbacks, aliases and canaries, under load."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import AdapterWeight, TurretClient
from turret.clients.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from turret.clients.verbs.generate import Conversation

NUM_WEIGHTS = 3
PROMPT = "SELECT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    arch = arch_of(save_tiny_model("llama", folder / "model"))
    for number in range(1, NUM_WEIGHTS + 1):
        spec = AdapterSpec(f"w{number}", rank=4, targets=ALL[:4], strength=1.0)
        write_adapter(folder / "adapters", arch, spec, seed=number)
    return folder


def start(folder: Path, state: Path, *flags: str) -> AbstractContextManager[ServerUnderTest]:
    return start_server(
        folder,
        *("--model", str(folder / "model"), "--dtype", "float32", "--state-dir", str(state)),
        *("--http-address", "127.0.0.1:0", "--keep-generations", "1", *flags),
    )


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    with start(folder, tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
def client(server: ServerUnderTest) -> Iterator[TurretClient]:
    with TurretClient(server.address) as client:
        yield client
        for alias in client.adapters.list_aliases():
            client.adapters.delete_alias(alias.name)
        for adapter in client.adapters.list():
            client.adapters.unload(adapter.name)


Asked = tuple[tuple[int, ...], str, int]


def ask(client: TurretClient, name: str, generation: int | None = None) -> Asked:
    """Greedy tokens, and the adapter and generation that made them."""
    adapter = AdapterWeight(name, generation=generation)
    completion = client.generate(
        PROMPT, adapters=adapter, temperature=0, max_tokens=6, ignore_eos=True, token_ids=True
    )
    (use,) = completion.adapters_used
    return completion.token_ids, use.name, use.generation


def http(server: ServerUnderTest, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer's JSON, or the status and code of an error."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://{server.http_address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]["code"]


def complete(server: ServerUnderTest, model: str) -> Any:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    return http(server, "/v1/completions", body)


def load_versions(client: TurretClient) -> dict[int, tuple[int, ...]]:
    """Two generations of an adapter; returns the answer of each."""
    client.adapters.load("dates", "w1")
    first, _, _ = ask(client, "dates")
    client.adapters.replace("dates", "w2")
    second, _, _ = ask(client, "dates")
    assert first != second
    return {1: first, 2: second}


class Load:
    """Requests for a name, from several threads, until the block ends; none may fail."""

    def __init__(self, client: TurretClient, name: str, threads: int = 4) -> None:
        self.answers: list[Asked] = []
        self._client, self._name = client, name
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._run) for _ in range(threads)]

    def _run(self) -> int:
        count = 0
        while not self._stop.is_set():
            self.answers.append(ask(self._client, self._name))
            count += 1
        return count

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        assert all(future.result() > 0 for future in self._futures)


def test_a_rollback_under_load_fails_no_request(
    server: ServerUnderTest, client: TurretClient
) -> None:
    expected = load_versions(client)
    assert ask(client, "dates", 1) == (expected[1], "dates", 1)
    used = complete(server, "dates@1")["adapters_used"][0]
    assert (used["name"], used["generation"]) == ("dates", 1)
    assert complete(server, "dates@9") == (404, "model_not_found")
    assert http(server, "/v1/models/dates@1")["generation"] == 1
    with Load(client, "dates") as load:
        for turn in range(10):
            generation = 1 + turn % 2
            record = client.adapters.rollback("dates", generation=generation)
            assert (record.generation, record.kept_generations) == (generation, (3 - generation,))
            assert ask(client, "dates") == (expected[generation], "dates", generation)
    assert {generation for _, _, generation in load.answers} == {1, 2}
    assert all(tokens == expected[number] for tokens, _, number in load.answers)
    with pytest.raises(FailedPreconditionError) as caught:
        client.adapters.rollback("dates", generation=1, expected_generation=1)
    assert caught.value.reason == "ADAPTER_GENERATION"


def test_an_alias_moves_under_load_and_streams_keep_their_target(client: TurretClient) -> None:
    by_weights = {}
    for number in range(1, NUM_WEIGHTS + 1):
        client.adapters.load("alone", f"w{number}")
        by_weights[number], _, _ = ask(client, "alone")
        client.adapters.unload("alone")
    client.adapters.load("dates", "w1")
    weights_of = {1: 1}
    client.adapters.set_alias("prod", "dates")
    stream = client.generate_stream(PROMPT, adapters="prod", max_tokens=60, ignore_eos=True)
    next(iter(stream))
    with Load(client, "prod") as load:
        for _ in range(8):
            # Two replacements: then only the alias keeps the generation that it names.
            for generation in range(max(weights_of) + 1, max(weights_of) + 3):
                weights_of[generation] = generation % NUM_WEIGHTS + 1
                path = f"w{weights_of[generation]}"
                assert client.adapters.replace("dates", path).generation == generation
            generation = max(weights_of)
            kept = client.adapters.get("dates").kept_generations
            assert kept == (generation - 2, generation - 1)
            client.adapters.set_alias("prod", AdapterWeight("dates", generation=generation))
            tokens = by_weights[weights_of[generation]]
            assert ask(client, "prod") == (tokens, "dates", generation)
            assert client.adapters.get("dates").kept_generations == (generation - 1,)
    assert len({generation for _, _, generation in load.answers}) > 3
    assert all(
        tokens == by_weights[weights_of[generation]] for tokens, _, generation in load.answers
    )
    rest = list(stream)
    assert [use.generation for use in rest[-1].adapters_used] == [1]


def test_a_canary_gets_its_share_and_metrics_show_it(
    server: ServerUnderTest, client: TurretClient
) -> None:
    expected = load_versions(client)
    client.adapters.load("other", "w3")
    targets = [
        AdapterWeight("dates", 0.7, generation=1),
        AdapterWeight("dates", 0.2, generation=2),
        AdapterWeight("other", 0.1),
    ]
    alias = client.adapters.set_alias("prod", targets)
    assert [(t.name, t.generation, t.weight) for t in alias.targets] == [
        ("dates", 1, 0.7),
        ("dates", 2, 0.2),
        ("other", 1, 0.1),
    ]
    assert client.adapters.list_aliases() == (alias,)
    answers = [ask(client, "prod") for _ in range(150)]
    found = Counter((name, generation) for _, name, generation in answers)
    # Each bound is at least four standard deviations away.
    assert 80 <= found["dates", 1] <= 130
    assert 10 <= found["dates", 2] <= 55
    assert 1 <= found["other", 1] <= 35
    assert all(tokens == expected[n] for tokens, name, n in answers if name == "dates")
    for (name, generation), count in found.items():
        labels = {"alias": "prod", "adapter": name, "generation": str(generation), "code": "OK"}
        assert server.metric("turret_alias_requests_total", **labels) == count
    # All choices of one HTTP request use one target, as do all inputs of a call.
    body = {"model": "prod", "prompt": PROMPT, "max_tokens": 2, "n": 4}
    for _ in range(8):
        assert len(http(server, "/v1/completions", body)["adapters_used"]) == 1
        assert len(client.embed([PROMPT] * 4, adapters="prod").adapters_used) == 1
    card = http(server, "/v1/models/prod")
    assert card["targets"][1] == {"name": "dates", "generation": 2, "weight": 0.2}
    assert http(server, "/v1/models/base:prod") == card
    conversation = Conversation(client, options={}, system=None, timeout=None)
    conversation.select([AdapterWeight("prod")])
    with pytest.raises(NotFoundError):
        conversation.select([AdapterWeight("nobody")])
    assert conversation.adapters == [AdapterWeight("prod")]
    assert card in http(server, "/v1/models")["data"]
    client.adapters.set_alias("prod", "other")
    gone = {"alias": "prod", "adapter": "dates", "generation": "1", "code": "OK"}
    with pytest.raises(KeyError):
        server.metric("turret_alias_requests_total", **gone)
    # A mix may name an alias, but not together with what it stands for.
    mix = client.generate(PROMPT, adapters={"prod": 0.5, "dates": 1}, max_tokens=1)
    assert [(use.name, use.weight) for use in mix.adapters_used] == [("other", 0.5), ("dates", 1)]
    with pytest.raises(InvalidArgumentError):
        client.generate(PROMPT, adapters=["prod", "other"], max_tokens=1)


def test_invalid_aliases_are_rejected(server: ServerUnderTest, client: TurretClient) -> None:
    load_versions(client)
    adapters = client.adapters
    adapters.set_alias("prod", AdapterWeight("dates", generation=1))
    with pytest.raises(InvalidArgumentError):
        adapters.set_alias("dates", "dates")
    with pytest.raises(InvalidArgumentError):
        adapters.load("prod", "w1")
    for name in ("base", "Base", "-prod", ""):
        with pytest.raises(InvalidArgumentError):
            adapters.set_alias(name, "dates")
    for target in ("nobody", "prod", "base", "new", AdapterWeight("dates", generation=9)):
        with pytest.raises(NotFoundError):
            adapters.set_alias("new", target)
    for targets in ([], ["dates"] * 17, ["dates", "dates"], [AdapterWeight("dates", 0.0)]):
        with pytest.raises(InvalidArgumentError):
            adapters.set_alias("new", targets)
    for call in (adapters.get, adapters.pin, adapters.unload, adapters.merge):
        with pytest.raises(NotFoundError):
            call("prod")
    with pytest.raises(NotFoundError):
        ask(client, "prod", 1)
    assert complete(server, "prod@1") == (404, "model_not_found")
    with pytest.raises(FailedPreconditionError):
        adapters.unload("dates")
    for name in ("dates", "base", "nobody"):
        with pytest.raises(NotFoundError):
            adapters.delete_alias(name)
    assert [alias.name for alias in adapters.list_aliases()] == ["prod"]
    adapters.delete_alias("prod")
    with pytest.raises(NotFoundError):
        ask(client, "prod")
    adapters.load("prod", "w1")
    for number in range(100):
        adapters.set_alias(f"a{number}", "dates")
    with pytest.raises(InvalidArgumentError):
        adapters.set_alias("one-more", "dates")
    adapters.set_alias("a7", "dates")


def test_a_merged_adapter_is_refused_at_both_protocols(
    server: ServerUnderTest, client: TurretClient
) -> None:
    expected = load_versions(client)
    client.adapters.set_alias("prod", "dates")
    client.adapters.load("other", "w3")
    client.adapters.merge(AdapterWeight("dates", generation=1), precision="bf16")
    try:
        for name in ("dates", "prod"):
            with pytest.raises(FailedPreconditionError) as caught:
                ask(client, name)
            assert caught.value.reason == "ADAPTER_MERGED"
            assert complete(server, name) == (409, "adapter_merged")
        assert complete(server, "other+dates*0.5") == (409, "adapter_merged")
        ask(client, "other")
    finally:
        client.adapters.unmerge()
    assert ask(client, "prod") == (expected[2], "dates", 2)


def test_versions_and_aliases_survive_a_kill(folder: Path, tmp_path: Path) -> None:
    with start(folder, tmp_path / "state") as server, TurretClient(server.address) as client:
        client.adapters.upload("dates", folder / "adapters" / "w1")
        client.adapters.upload("dates", folder / "adapters" / "w2", replace=True)
        client.adapters.load("other", "w3")
        targets = [AdapterWeight("dates", 0.75, generation=1), AdapterWeight("other", 0.25)]
        alias = client.adapters.set_alias("prod", targets)
        client.adapters.set_alias("gone", "other")
        client.adapters.delete_alias("gone")
        expected = {number: ask(client, "dates", number) for number in (1, 2)}
        client.adapters.rollback("dates")
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(60)
        # The context manager expects a server that can be stopped.
        server.process.send_signal = lambda _: None  # type: ignore[method-assign]
        server.process.wait = lambda _: 0  # type: ignore[method-assign]
    with start(folder, tmp_path / "state") as server, TurretClient(server.address) as client:
        assert client.adapters.list_aliases() == (alias,)
        record = client.adapters.get("dates")
        assert (record.generation, record.kept_generations) == (1, (2,))
        assert {number: ask(client, "dates", number) for number in (1, 2)} == expected
        assert ask(client, "prod")[1:] in (("dates", 1), ("other", 1))
        assert client.adapters.rollback("dates", generation=2).generation == 2
        assert ask(client, "dates") == expected[2]
