"""``turret verify`` against a real server, with right adapters and with planted faults."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from builders.bases.tiny_models import save_tiny_model
from builders.methods import make_config, save_adapter
from safetensors.torch import load_file, save_file
from said import says
from servers.server_under_test import ServerUnderTest, start_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from turret.server.cli import main
from turret.training.verification.checks import Verdict, _case, ask_together, reload
from turret.training.verification.client import Continuation, VerifiedServer
from turret.training.words import RunError, say

_TWO_KINDS = {"target_modules": ["q_proj", "down_proj"]}
_SILENT, _HALF, _OTHER, _REPAIR = "silent", "half", "other", "repair"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its adapters, and ``adapters`` with the ones that the server gets."""
    folder = tmp_path_factory.mktemp("verify")
    save_tiny_model("llama", folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    configs = {
        "lora": make_config("lora", **_TWO_KINDS),
        "loha": make_config("loha", **_TWO_KINDS),
        "head": make_config("lora", **_TWO_KINDS, modules_to_save=["lm_head"]),
        _SILENT: make_config("lora", **_TWO_KINDS),
        _HALF: make_config("lora", **_TWO_KINDS),
        _OTHER: make_config("lora", **_TWO_KINDS),
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_adapter(model, config, folder / name, seed=seed)
        shutil.copytree(folder / name, folder / "adapters" / name)
    for name, lost in ((_SILENT, "_proj"), (_HALF, "down_proj")):
        file = folder / "adapters" / name / "adapter_model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if lost in key:
                tensors[key] = torch.zeros_like(tensor)
        save_file(tensors, file)
    shutil.copytree(folder / "lora", folder / "adapters" / _OTHER, dirs_exist_ok=True)
    (folder / "text").write_text("Some words of a language. " * 100)
    flags = ("--text", str(folder / "text"), "--rank", "8", "--output", str(folder / _REPAIR))
    assert main(["model", "repair", str(folder / "model"), *flags]) == 0
    shutil.copytree(folder / _REPAIR, folder / "adapters" / _REPAIR)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerUnderTest]:
    names = [path.name for path in (folder / "adapters").iterdir()]
    flags = [flag for name in names for flag in ("--preload", f"{name}={name}")]
    http = ("--http-address", "127.0.0.1:0")
    with start_server(folder, "--model", str(folder / "model"), *http, *flags) as running:
        yield running


def _verify(
    server: ServerUnderTest, folder: Path, capsys: pytest.CaptureFixture[str], *names: str
) -> tuple[int, dict[str, dict]]:
    code = main(
        [
            *("verify", "--against", f"http://{server.http_address}", "--json", "--quiet"),
            *("--model", str(folder / "model")),
            *(str(folder / name) for name in names),
        ]
    )
    out = capsys.readouterr().out
    return code, {verdict["name"]: verdict for verdict in json.loads(out)}


def test_a_correct_server_passes(
    server: ServerUnderTest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _verify(server, folder, capsys, "lora", "loha", "head", _REPAIR)
    assert code == 0
    assert list(found) == ["base", "lora", "loha", "head", _REPAIR]
    for verdict in found.values():
        assert verdict["right"]
        assert verdict["same"] == verdict["tokens"] > 0


def test_a_repair_adapter_joins_a_mix(server: ServerUnderTest) -> None:
    body = {"model": f"lora+{_REPAIR}", "prompt": "Some words", "max_tokens": 1}
    answer = httpx2.post(f"http://{server.http_address}/v1/completions", json=body, timeout=60)
    used = answer.json()["adapters_used"]
    assert [each["name"] for each in used] == ["lora", _REPAIR]


def test_a_file_without_prompts_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts"
    path.write_text("\n \n")
    flags = ("--against", "http://127.0.0.1:1", "--prompts", str(path))
    assert main(["verify", *flags]) == 1
    assert say("NO_PROMPTS", path=path) in capsys.readouterr().err


def test_keys_without_effect_are_named(
    server: ServerUnderTest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _verify(server, folder, capsys, _SILENT, _HALF, _OTHER)
    assert code == 1
    assert found["base"]["right"]
    wrong = {name: verdict["without_effect"] for name, verdict in found.items() if name != "base"}
    assert wrong == {_SILENT: ["*"], _HALF: ["down_proj"], _OTHER: []}
    assert not any(found[name]["right"] for name in wrong)


def test_tokens_after_an_omitted_one_are_not_compared(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt, text = "Say: ", "naïve 🙂 day"
    ids = tokenizer(prompt).input_ids
    # Each byte is a token.
    tokens = tokenizer(text).input_ids
    firsts = [len(text[:place].encode()) for place, char in enumerate(text) for _ in char.encode()]
    for left_out, first in enumerate(firsts):
        known = (*tokens[:left_out], *tokens[left_out + 1 :])
        case = _case(tokenizer, prompt, ids, Continuation(text, known, (0.0,) * len(known)))
        assert (case.ids if case else []) == tokens[:first]
    case = _case(tokenizer, prompt, ids, Continuation(text, tuple(tokens), (0.0,) * len(tokens)))
    assert case is not None
    assert case.ids == tokens


class _Wavering:
    """A server whose answers change with load, or if another adapter had the name before."""

    def __init__(self) -> None:
        self.is_busy = False
        self._names: dict[str, Path] = {}

    def ask(self, adapter: str | None, prompt: list[int], max_tokens: int) -> Continuation:
        text = str(self._names.get(adapter or "", adapter))
        return Continuation(text, (1,), (-1.0 - self.is_busy,))

    def load(self, name: str, path: Path) -> None:
        self._names.setdefault(name, Path(path.name))

    def unload(self, name: str) -> None: ...


def test_answers_that_change_are_counted() -> None:
    server = _Wavering()
    adapters = {name: Path(name) for name in ("one", "two")}
    verdicts = {name: Verdict(name) for name in adapters}
    prompts = [[1], [2]]
    alone = {name: [server.ask(name, ids, 1) for ids in prompts] for name in adapters}
    reload(server, adapters, prompts, 1, alone, verdicts)  # type: ignore[arg-type]
    assert [verdict.reloaded for verdict in verdicts.values()] == [0, 2]
    ask_together(server, prompts, 1, alone, verdicts)  # type: ignore[arg-type]
    assert [verdict.mixed for verdict in verdicts.values()] == [0, 0]
    server.is_busy = True
    ask_together(server, prompts, 1, alone, verdicts)  # type: ignore[arg-type]
    assert [verdict.mixed for verdict in verdicts.values()] == [2, 2]


def test_unknown_paths_may_be_answered_with_an_html_page(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Client(httpx2.Client):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            opened.append(self)

    monkeypatch.setattr(httpx2, "Client", Client)

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_list = self.path == "/some/v1/models"
            self.send_response(200)
            self.send_header("content-type", "application/json" if is_list else "text/html")
            self.end_headers()
            self.wfile.write(
                b'{"data": [{"id": "tuned", "parent": "base"}]}' if is_list else b"<html></html>"
            )

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with VerifiedServer(f"{url}/some/v1/", None) as verified:
                assert verified.names == {"tuned"}
                with pytest.raises(RunError, check=says("NO_BASE_LISTED")):
                    verified.ask(None, [1], 1)
            with pytest.raises(RunError, check=says("NO_MODEL_LIST")):
                VerifiedServer(url, None)
        finally:
            server.shutdown()
    assert [client.is_closed for client in opened] == [True, True]


def test_an_unknown_adapter_is_refused(
    server: ServerUnderTest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            *("verify", "--against", server.http_address),
            *("--model", str(folder / "model"), f"missing={folder / 'lora'}"),
        ]
    )
    assert code == 1
    assert "missing" in capsys.readouterr().err
