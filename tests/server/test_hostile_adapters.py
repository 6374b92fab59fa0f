"""Hostile chat templates and tokenizers on a real server, alongside a harmless client."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from builders.added_tokens import grown_tokenizer, save_grown
from builders.methods import make_config
from grpc_health.v1 import health_pb2, health_pb2_grpc
from method_oracle import twin
from servers.neighbour import Neighbour
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.server.words import say

# The model's own template, whose behaviour depends on the first message.
TEMPLATE = """\
{% set said = messages[0].content %}\
{% if said == 'power' %}{{ said|length ** (9**9) }}\
{% elif said == 'format' %}{{ '{:>2000000000}'.format(said) }}\
{% elif said == 'wrap' %}{{ (said * 10**7)|wordwrap(1) }}\
{% elif said == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}\
{% endfor %}\
{% elif said == 'long' %}{{ said * 10**6 }}\
{% else %}{{ said }}{% endif %}"""
SLOW = ("power", "wrap", "loop")
# Jinja computes this constant when it compiles the template.
CONSTANT = "{% set x = 9**(9**9) %}{{ messages[0].content }}"
BACKTRACKS = {
    "type": "Split",
    "pattern": {"Regex": "(a+)+b"},
    "behavior": "Isolated",
    "invert": False,
}
# The limit, even if other programs use the processors; without limits, rendering would never end.
MAX_SECONDS = 3.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of the model, alongside an adapter root with two adapters that have tokenizers."""
    model = shutil.copytree(twin("llama").folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    saved: Any = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    tokenizer = grown_tokenizer(CONSTANT)
    for name in ("constant", "regex"):
        place = tmp_path / "adapters" / name
        save_grown(twin("llama").model, make_config("lora", **saved), place, tokenizer=tokenizer)
    file = tmp_path / "adapters" / "regex" / "tokenizer.json"
    said = json.loads(file.read_text())
    parts = [BACKTRACKS, said["pre_tokenizer"]]
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    file.write_text(json.dumps(said))
    return model


def refusal(client: TurretClient, said: str, **how: Any) -> str:
    """The error of a rejected chat."""
    with pytest.raises(TurretRpcError) as refused:
        client.chat(said, timeout=180, max_tokens=1, **how)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT, refused.value
    return str(refused.value)


def family_bytes(server: ServerUnderTest) -> int:
    """The memory of the server and of its children."""
    process = psutil.Process(server.process.pid)
    total = process.memory_info().rss
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total


def test_hostile_templates_and_tokenizers_do_not_stop_other_requests(
    model: Path, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    start = start_server(tmp_path, "--model", str(model), environment=environment)
    with (
        start as server,
        TurretClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def stream() -> list[object]:
            return list(client.generate_stream("a", max_tokens=40, ignore_eos=True, timeout=60))

        client.adapters.load("constant", "constant")
        client.chat("hi", max_tokens=1)
        before = most = family_bytes(server)
        checks, streams = (
            Neighbour(lambda: [stub.Check(health_pb2.HealthCheckRequest(), timeout=60)]),
            Neighbour(stream),
        )
        with ThreadPoolExecutor(8) as pool, checks, streams:
            slow = [pool.submit(refusal, client, said) for said in SLOW]
            slow.append(pool.submit(refusal, client, "hi", adapters="constant"))
            large, long = (pool.submit(refusal, client, said) for said in ("format", "long"))
            with pytest.raises(TurretRpcError, match="pre_tokenizer"):
                client.adapters.load("regex", "regex")
            while not all(each.done() for each in (*slow, large, long)):
                most = max(most, family_bytes(server))
                time.sleep(0.02)
        for each in slow:
            assert say("PROCESS_TIME_LIMIT", seconds=2) in each.result()
        assert say("PROCESS_MEMORY_LIMIT", most="256MiB") in large.result()
        # The text exceeds the model's context, so it was not tokenised.
        assert "PROMPT_TOO_LONG" in long.result()
        client.chat("hi", max_tokens=1)
        assert checks.worst < MAX_SECONDS
        assert streams.counts[0] > 2
        # Two processes rendered at the same time, each within its limit.
        assert most - before < 700 << 20
        assert family_bytes(server) - before < 100 << 20
        # A shutdown does not wait for a template either.
        with ThreadPoolExecutor(1) as pool:
            abandoned = pool.submit(client.chat, "loop", timeout=60)
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            server.process.wait(60)
            assert time.monotonic() - stopped < 40.0
            assert isinstance(abandoned.exception(), TurretRpcError)
