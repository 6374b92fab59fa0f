"""``--model org/name``: resolved once, downloaded to the hub's cache, or rejected on one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from builders.adapters import edit_config
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from huggingface_hub import constants
from said import says
from servers.fake_hub import TOKEN, FakeHub, Repo, environment
from servers.server_under_test import start_server

from turret.clients.client import TurretClient
from turret.server.basics.names import HubId
from turret.server.errors import InvalidRequestError
from turret.server.models.model_source import ModelSource, resolve_model
from turret.server.models.sources.check import check_model
from turret.server.words import Text, say

NAME = "acme/tiny"


@pytest.fixture
def repo(hub: FakeHub, tiny_llama: Path) -> Repo:
    """The model, with other files that repositories may contain."""
    repo = hub.repo(NAME, tiny_llama)
    files = repo.commits[repo.refs["main"]]
    beside = {"pytorch_model.bin": b"p", "modeling.py": b"m", "README.md": b"r", "a/b.json": b"{}"}
    repo.push({**files, **beside, "consolidated.safetensors": b"c"})
    return repo


def resolved(tmp_path: Path, name: str = NAME) -> ModelSource:
    return resolve_model(Path(name), tmp_path / "cache")


def refused(name: str = NAME) -> Text:
    with pytest.raises(InvalidRequestError) as caught:
        check_model(Path(name))
    ((field, text),) = caught.value.violations
    assert field == "model"
    return text


@pytest.mark.parametrize(
    ("file", "has_xet"),
    [("config.json", False), ("model.safetensors", False), ("model.safetensors", True)],
)
def test_a_hub_that_sends_more_than_announced_does_not_fill_the_disk(
    hub: FakeHub,
    repo: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    has_xet: bool,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.has_xet = has_xet
    repo.lied_sizes[file] = 10
    with pytest.raises(InvalidRequestError) as caught:
        resolved(tmp_path)
    assert [text.reason for _, text in caught.value.violations] == ["HUB_SENT_TOO_MUCH"]


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_valid_and_invalid_hub_ids() -> None:
    assert HubId.parse("a/b") == HubId("a", "b")
    assert HubId.parse("a/b-1.5_x@refs/pr/3") == HubId("a", "b-1.5_x", "refs/pr/3")
    assert str(HubId.parse("a/b@v1")) == "a/b@v1"
    for text in ("a", "a/b/c", "/a/b", "a/", "../b", "a/b@", "a/b@../x", "a--b/c", "~/m", "a b/c"):
        assert HubId.find(text) is None, text


def test_only_needed_files_are_fetched(hub: FakeHub, repo: Repo, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    source = resolve_model(Path(NAME), tmp_path / "cache", lambda *said: reports.append(said))
    assert source.name == NAME
    assert source.commit == repo.refs["main"]
    assert source.files.name == source.commit
    assert len(list(source.files.iterdir())) == len(hub.downloads())
    taken = set(hub.downloads())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= taken
    assert taken.isdisjoint(
        {"pytorch_model.bin", "modeling.py", "README.md", "b.json", "consolidated.safetensors"}
    )
    what = [said for said in reports if said[0].startswith("Downloading")]
    assert what[0][0] == f"Downloading {NAME} (MiB)"
    assert what[-1][1] == what[-1][2]


def test_a_downloaded_model_equals_its_directory(
    repo: Repo, tmp_path: Path, tiny_llama: Path
) -> None:
    assert resolved(tmp_path).digest == resolve_model(tiny_llama, tmp_path / "other").digest


def test_a_second_start_fetches_nothing(hub: FakeHub, repo: Repo, tmp_path: Path) -> None:
    first = resolved(tmp_path)
    before = len(hub.downloads())
    assert resolved(tmp_path) == first
    assert len(hub.downloads()) == before


def test_sizes_are_read_from_the_config_without_the_weights(
    hub: FakeHub, repo: Repo, tiny_llama: Path
) -> None:
    found, expected = check_model(Path(NAME)), check_model(tiny_llama)
    assert found.projections() == expected.projections() is not None
    assert found.vocab_size == expected.vocab_size > 0
    assert [name for name in hub.downloads() if "config.json" not in name] == []


def test_a_revision_is_one_commit(hub: FakeHub, repo: Repo, tmp_path: Path) -> None:
    old = repo.refs["main"]
    repo.refs["v1"] = old
    files = repo.commits[old]
    newer = repo.push({**files, "generation_config.json": b'{"eos_token_id": 3}'})
    assert resolved(tmp_path).commit == newer
    assert resolved(tmp_path, f"{NAME}@v1").commit == old
    assert resolved(tmp_path, f"{NAME}@{old}").commit == old
    assert says("HUB_NO_REVISION", revision="v2")(refused(f"{NAME}@v2"))


def test_a_broken_download_is_resumed(
    hub: FakeHub,
    repo: Repo,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The received part of an incomplete chunk is requested again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    check_model(Path(NAME))
    hub.cuts = 4
    hub.requests.clear()
    source = resolved(tmp_path)
    assert hub.cuts == 0
    assert sum("bytes=" in line for line in hub.requests) == 4
    assert source.digest == resolve_model(tiny_llama, tmp_path / "other").digest


def test_a_file_missing_from_xet_comes_from_the_hub(
    hub: FakeHub, repo: Repo, tmp_path: Path, tiny_llama: Path
) -> None:
    """The hub keeps large files in a separate storage, which a mirror may lack."""
    hub.has_xet = True
    reports: list[tuple[str, int, int]] = []
    source = resolve_model(Path(NAME), tmp_path / "cache", lambda *said: reports.append(said))
    assert any("/xet-storage/" in line for line in hub.requests)
    assert source.digest == resolve_model(tiny_llama, tmp_path / "other").digest
    assert hub.downloads().count("model.safetensors") == 1
    # The storage is tried once, not for every file.
    hub.requests.clear()
    hub.repo("acme/more", tiny_llama)
    resolved(tmp_path, "acme/more")
    assert not any("/xet-storage/" in line for line in hub.requests)


def test_a_file_that_never_arrives_is_refused(
    hub: FakeHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    check_model(Path(NAME))
    hub.cuts = 1000
    with pytest.raises(InvalidRequestError, check=says("HUB_NOT_REACHED")):
        resolved(tmp_path)
    hub.cuts = 0
    assert resolved(tmp_path).commit == repo.refs["main"]


def test_sharded_weights_are_fetched_by_their_index(
    hub: FakeHub, repo: Repo, tmp_path: Path
) -> None:
    files = dict(repo.commits[repo.refs["main"]])
    files["x-1.safetensors"] = files.pop("model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "x-1.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    repo.push(files)
    assert resolved(tmp_path).commit == repo.refs["main"]
    assert "x-1.safetensors" in hub.downloads()
    del files["x-1.safetensors"]
    repo.push(files)
    with pytest.raises(InvalidRequestError, check=says("FILES_MISSING", name="x-1.safetensors")):
        resolved(tmp_path)


def test_cached_weights_are_checked_before_they_are_read(repo: Repo, tmp_path: Path) -> None:
    folder = resolved(tmp_path).files
    check_model(Path(NAME))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert refused().params["path"].name == "model.safetensors"
    file.write_bytes(whole)


def test_the_cache_is_used_offline(
    hub: FakeHub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = resolved(tmp_path).commit
    repo.push({**repo.commits[commit], "more.json": b"{}"})
    hub.requests.clear()
    with monkeypatch.context() as patch:
        offline(patch)
        assert resolved(tmp_path).commit == commit
        assert hub.requests == []
        assert says("HUB_OFFLINE")(refused("acme/other"))
    hub.status = 503
    assert resolved(tmp_path).commit == commit
    assert says("HUB_STATUS", status=503)(refused("acme/other"))


def test_an_incomplete_model_in_the_cache_is_reported(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_model(Path(NAME))
    offline(monkeypatch)
    assert refused() == say("HUB_CACHE_INCOMPLETE", model=NAME)


def test_a_token_gives_access_to_private_repositories(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.is_private = True
    assert says("HUB_NO_REPOSITORY", name=NAME)(refused())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolved(tmp_path).commit == repo.refs["main"]


def test_errors_suggest_the_next_step(hub: FakeHub, repo: Repo, tiny_llama: Path) -> None:
    repo.is_gated = True
    assert says("HUB_GATED", hub=hub.endpoint, name=NAME)(refused())
    repo.is_gated = False
    assert says("HUB_NO_REPOSITORY")(refused("acme/tyni"))
    files = repo.commits[repo.refs["main"]]

    def without(*names: str, **added: bytes) -> None:
        kept = {name: data for name, data in files.items() if name not in names}
        repo.push({**kept, **added})

    without("tokenizer.json")
    assert refused() == say("NO_TOKENIZER", model=NAME)
    without("model.safetensors")
    assert refused() == say("MODEL_HAS_NO_WEIGHTS", model=NAME, file="model.safetensors")
    without("config.json")
    assert refused() == say("MODEL_HAS_NO_CONFIG", model=NAME)
    repo.push({"adapter_config.json": b"{}"})
    assert refused() == say("MODEL_IS_AN_ADAPTER", model=NAME)
    repo.push({"tiny.Q4_0.gguf": b"GGUF"})
    assert refused() == say("MODEL_IS_GGUF", model=NAME, file="tiny.Q4_0.gguf")
    repo.push({**files, "config.json": b'{"model_type": "bert"}'})
    hub.requests.clear()
    assert says("CONFIG_UNSUPPORTED", value="bert")(refused())
    assert hub.downloads() == ["config.json"]


def test_a_mirrors_password_is_not_shown(
    hub: FakeHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = hub.endpoint.removeprefix("http://")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://me:secret@{address}")
    repo.is_gated = True
    for status in (None, 404, 503):
        hub.status = status
        said = refused()
        assert hub.endpoint in said
        assert "secret" not in said


def test_an_unreachable_hub_fails_fast(hub: FakeHub) -> None:
    hub.close()
    started = time.monotonic()
    assert says("HUB_NOT_REACHED")(refused())
    assert time.monotonic() - started < 20


# A server with model and adapters from the hub; only ``HF_ENDPOINT`` and ``HF_HOME`` are set.


@pytest.mark.long
def test_a_server_serves_a_model_and_adapters_from_the_hub(
    hub: FakeHub, tiny_llama: Path, tmp_path: Path
) -> None:
    model = hub.repo("acme/tiny", tiny_llama)
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path, arch_of(tiny_llama), AdapterSpec(name, rank=4), seed)
        edit_config(tmp_path / name, base_model_name_or_path="acme/tiny")
        hub.repo(f"acme/{name}", tmp_path / name)
    flags = ("--model", "acme/tiny", "--adapter-hub", "acme", "--preload", "one=hub:acme/one")
    with (
        start_server(tmp_path, *flags, environment=environment(hub, tmp_path / "home")) as server,
        TurretClient(server.address) as client,
    ):
        told = client.get_model()
        assert (told.name, told.commit) == ("acme/tiny", model.refs["main"])
        two = client.adapters.load("two", "hub:acme/two")
        assert two.source == f"hub:acme/two@{hub.repos['acme/two'].refs['main']}"
        answers = {
            client.generate(
                "abc", adapters=[name] if name else [], max_tokens=8, temperature=0
            ).text
            for name in ("", "one", "two")
        }
        assert len(answers) == 3
