"""A real server: replace under load, upload, export, restart, unload."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders.adapters import load_with_peft
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from safetensors.torch import load_file
from servers.server_under_test import ServerUnderTest, start_server
from transformers import AutoModelForCausalLM

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError

NUM_WEIGHTS = 4
PROMPTS = ("one two three", "SELECT", "Dear reader, " * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    model = save_tiny_model("llama", folder / "model")
    arch = arch_of(model)
    for number in range(NUM_WEIGHTS):
        spec = AdapterSpec(
            f"w{number}", rank=2 + 2 * number, targets=ALL[:4], is_dora=number == 2, strength=1.0
        )
        write_adapter(folder / "adapters", arch, spec, seed=number)
    return folder


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[ServerUnderTest]:
    with start(folder, tmp_path) as running:
        yield running


def start(folder: Path, tmp_path: Path):
    """A server on the tiny model, with its state in ``tmp_path``."""
    return start_server(
        folder,
        *("--model", str(folder / "model"), "--dtype", "float32"),
        *("--state-dir", str(tmp_path / "state")),
    )


def answer(client: TurretClient, prompt: str, name: str) -> tuple[tuple[int, ...], int]:
    """Greedy tokens, and the generation that computed them."""
    completion = client.generate(
        prompt, adapters=[name], temperature=0, max_tokens=6, ignore_eos=True, token_ids=True
    )
    return completion.token_ids, completion.adapters_used[0].generation


def expected_answers(client: TurretClient) -> dict[tuple[int, str], tuple[int, ...]]:
    """The answers by number of the weights and prompt, each requested alone."""
    answers = {}
    for number in range(NUM_WEIGHTS):
        client.adapters.load(f"alone-{number}", f"w{number}")
        for prompt in PROMPTS:
            answers[number, prompt], _ = answer(client, prompt, f"alone-{number}")
        client.adapters.unload(f"alone-{number}")
    assert len(set(answers.values())) == len(answers), "the weights are told apart by every prompt"
    return answers


def bytes_held(server: ServerUnderTest) -> dict[str, float]:
    return {t: server.metric("turret_adapter_bytes", tier=t) for t in ("host", "device")}


def test_replace_under_load_fails_no_request_and_gives_no_stale_answer(
    server: ServerUnderTest,
) -> None:
    with TurretClient(server.address) as client:
        expected = expected_answers(client)
        client.adapters.load("live", "w0")
        weights_of = {1: 0}
        stop = threading.Event()
        answers: list[tuple[str, tuple[int, ...], int]] = []

        def ask(prompt: str) -> int:
            count = 0
            while not stop.is_set():
                tokens, generation = answer(client, prompt, "live")
                answers.append((prompt, tokens, generation))
                count += 1
            return count

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, prompt) for prompt in PROMPTS for _ in range(2)]
            try:
                for turn in range(1, 13):
                    number = turn % NUM_WEIGHTS
                    # Record this first, because an answer may overtake the reply.
                    weights_of[turn + 1] = number
                    record = client.adapters.replace("live", f"w{number}")
                    assert record.generation == turn + 1
                    for prompt in PROMPTS:
                        assert answer(client, prompt, "live") == (
                            expected[number, prompt],
                            turn + 1,
                        )
            finally:
                stop.set()
            assert all(future.result() > 0 for future in asking)
        for prompt, tokens, generation in answers:
            assert tokens == expected[weights_of[generation], prompt]
        assert len({generation for _, _, generation in answers}) > 6
        record = client.adapters.get("live")
        assert record.in_flight == 0
        # Nothing of the earlier generations is left.
        assert bytes_held(server) == {"host": record.bytes_host, "device": record.bytes_device}
        client.adapters.unload("live")
        assert bytes_held(server)["host"] == 0
        # The engine thread may not have processed the unload yet.
        answer_of_the_base = client.generate("x", max_tokens=1)
        assert answer_of_the_base.usage.completion_tokens == 1
        assert bytes_held(server) == {"host": 0, "device": 0}


def test_upload_export_and_peft(server: ServerUnderTest, folder: Path, tmp_path: Path) -> None:
    source = folder / "adapters" / "w2"
    with TurretClient(server.address) as client:
        client.adapters.upload("up", source)
        before = answer(client, PROMPTS[0], "up")
        record = client.adapters.export("up", tmp_path / "out")
        assert record.digest == client.adapters.get("up").digest
        client.adapters.upload("up", folder / "adapters" / "w1", replace=True)
        assert answer(client, PROMPTS[0], "up") != before
        with pytest.raises(TurretRpcError) as caught:
            client.adapters.upload("up", source)
        assert caught.value.code.name == "ALREADY_EXISTS"
        again = client.adapters.upload("again", tmp_path / "out")
        assert again.digest == record.digest
        assert answer(client, PROMPTS[0], "again")[0] == before[0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        original, exported = (
            load_with_peft(model, path)(input_ids=tokens).logits
            for path in (source, tmp_path / "out")
        )
        plain = model(input_ids=tokens).logits
    assert torch.equal(original, exported)
    assert not torch.allclose(original, plain, atol=1e-2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(
        torch.equal(value, load_file(source / "adapter_model.safetensors")[name])
        for name, value in tensors.items()
    )


def test_a_restart_keeps_the_registry_and_reads_a_cold_adapter_once(
    folder: Path, tmp_path: Path
) -> None:
    with start(folder, tmp_path) as server, TurretClient(server.address) as client:
        client.adapters.load("a", "w0")
        client.adapters.load("pinned", "w1", pinned=True)
        client.adapters.upload("up", folder / "adapters" / "w3")
        client.adapters.replace("a", "w2")
        client.adapters.load("gone", "w0")
        client.adapters.unload("gone")
        before = list(client.adapters.list())
        answers = {name: answer(client, PROMPTS[1], name) for name in ("a", "pinned", "up")}
    with start(folder, tmp_path) as server, TurretClient(server.address) as client:
        after = list(client.adapters.list())
        assert [(r.name, r.uuid, r.generation, r.digest, r.pinned, r.ranks) for r in after] == [
            (r.name, r.uuid, r.generation, r.digest, r.pinned, r.ranks) for r in before
        ]
        assert [r.residency for r in after] == ["DISK", "HOST", "DISK"]

        def reads() -> float:
            return server.metric("turret_adapter_load_seconds_count", stage="read")

        count = reads()
        with ThreadPoolExecutor(100) as pool:
            asked = [
                pool.submit(
                    client.generate,
                    PROMPTS[1],
                    adapters=["up"],
                    temperature=0,
                    max_tokens=6,
                    ignore_eos=True,
                    token_ids=True,
                )
                for _ in range(100)
            ]
            completions = [future.result() for future in asked]
        assert {c.token_ids for c in completions} == {answers["up"][0]}
        assert reads() == count + 1
        cold = [c.adapters_used[0] for c in completions if c.adapters_used[0].cold_start]
        assert cold
        assert all(use.load_ms > 0 for use in cold)
        assert {name: answer(client, PROMPTS[1], name) for name in answers} == answers
        client.adapters.unload("up")
        assert list((tmp_path / "state" / "files").iterdir()) == []
        with pytest.raises(TurretRpcError) as caught:
            client.adapters.unload("pinned")
        assert caught.value.code.name == "FAILED_PRECONDITION"
