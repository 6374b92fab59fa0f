"""``hub:org/name``: allowed by organisation, limited before and during the download, and cached."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.registries import tiny_base
from huggingface_hub import constants
from said import says
from servers.fake_hub import TOKEN, FakeHub, Repo

from turret.server import errors
from turret.server import remote as hub_adapters
from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.registry import AdapterRegistry
from turret.server.command.preflight import problems
from turret.server.config import AdapterConfig, Config, ListenConfig
from turret.server.remote import AdapterHub
from turret.server.words import Text

PATH = "hub:acme/a"
_Make = Callable[..., AdapterRegistry]


@pytest.fixture
def repo(hub: FakeHub, checkpoints: Path) -> Repo:
    return hub.repo("acme/a", checkpoints / "a")


@pytest.fixture
def registry(registry_with: _Make) -> _Make:
    """Create a registry that may fetch from some places, and close the previous one."""

    def make(*allowed: str, max_bytes: int = 1 << 20) -> AdapterRegistry:
        return registry_with(hub=AdapterHub(allowed, max_bytes))

    return make


def refused(
    registry: AdapterRegistry, path: str, kind: type[errors.TurretError], reason: str, **params: Any
) -> None:
    """Check that a load fails with a reason, in the error itself or in one of its parts."""
    with pytest.raises(kind, check=says(reason, **params)):
        registry.load("a", path)
    assert registry.list() == []


def load_in_vain(registry: AdapterRegistry) -> None:
    with pytest.raises(errors.TurretError):
        registry.load("b", PATH)


def test_the_loaded_adapter_is_the_one_that_was_pushed(
    registry: _Make, repo: Repo, checkpoints: Path
) -> None:
    loaded = registry("acme").load("a", PATH)
    local = AdapterRegistry(checkpoints, tiny_base(), 1 << 30, 64)
    assert loaded.facts.digest == local.load("a", "a").facts.digest
    local.close()
    assert loaded.source == f"{PATH}@{repo.refs['main']}"


def test_preloaded_adapters_are_checked_before_the_model_is_loaded(
    hub: FakeHub, repo: Repo, checkpoints: Path
) -> None:
    def found(path: str, max_bytes: int = 1 << 20) -> list[Text]:
        config = Config(
            listen=ListenConfig(address="127.0.0.1:0", metrics_address=None),
            adapters=AdapterConfig(
                adapter_hub=("acme",), preload=(("a", path),), max_upload_bytes=max_bytes
            ),
        )
        return [problem.text for problem in problems(config)]

    assert found(PATH) == []
    # The weights are downloaded only once the model is available.
    assert hub.downloads() == []
    (problem,) = found("hub:acme/b")
    assert says("HUB_NO_REPOSITORY", name="acme/b")(problem)
    assert says("UPLOAD_TOO_LARGE", max_upload_bytes=10)(found(PATH, max_bytes=10)[0])
    hub.repo("acme/c", checkpoints.parent)
    assert says("BAD_PATH", path="hub:acme/c")(found("hub:acme/c")[0])
    hub.status = 503
    (problem,) = found(PATH)
    assert says("HUB_STATUS", status=503)(problem)


def test_only_allowed_organisations_are_contacted(
    registry: _Make, hub: FakeHub, repo: Repo
) -> None:
    refused(registry(), PATH, errors.AdapterCheckpointError, "HUB_NOT_ALLOWED")
    reason = "HUB_ORGANISATION_NOT_ALLOWED"
    refused(registry("other"), PATH, errors.AdapterCheckpointError, reason, choices="other")
    for path in ("hub:", "hub:a", "hub:acme/a/b", "hub:acme/../a", "hub:acme/a@"):
        refused(registry("*"), path, errors.AdapterCheckpointError, "NOT_A_HUB_ID")
    assert hub.requests == []
    assert registry("*").load("a", PATH).source


def test_a_restart_serves_the_same_commit_without_network_access(
    registry: _Make, hub: FakeHub, repo: Repo, checkpoints: Path
) -> None:
    first = registry("acme").load("a", PATH)
    repo.push({p.name: p.read_bytes() for p in (checkpoints / "b").iterdir()})
    hub.requests.clear()
    again = registry("acme")
    assert again.get("a").source == first.source
    again.pin("a")
    assert again.get("a").facts.digest == first.facts.digest
    assert hub.requests == []
    with again.export("a") as export:
        assert {file.name for file in export.files} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    # A second load by name uses the current commit.
    replaced = again.replace("a", PATH)
    assert (replaced.generation, replaced.source) == (2, f"{PATH}@{repo.refs['main']}")
    assert replaced.facts.digest != first.facts.digest


def test_a_cache_that_was_emptied_is_filled_again(
    registry: _Make, hub: FakeHub, repo: Repo, tmp_path: Path
) -> None:
    first = registry("acme").load("a", PATH)
    repo.refs["main"] = "0" * 40
    shutil.rmtree(tmp_path / "hub")
    again = registry("acme")
    hub.status = 503
    with pytest.raises(errors.HubUnavailableError, check=says("HUB_STATUS", status=503)):
        again.pin("a")
    hub.status = None
    mix = again.acquire([AdapterRef(name="a")])
    answered = threading.Event()
    mix.ensure_host(lambda result: answered.set())
    assert answered.wait(20)
    assert again.get("a").residency == "host"
    assert again.get("a").facts.digest == first.facts.digest
    again.release(mix)


def test_errors_of_the_hub_reach_the_caller(
    registry: _Make, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = registry("acme")
    refused(one, "hub:acme/b", errors.HubError, "HUB_NO_REPOSITORY", name="acme/b")
    refused(one, f"{PATH}@v9", errors.HubError, "HUB_NO_REVISION", revision="v9")
    repo.is_gated = True
    refused(one, PATH, errors.HubError, "HUB_GATED")
    repo.is_gated, repo.is_private = False, True
    refused(one, PATH, errors.HubError, "HUB_NO_REPOSITORY")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert one.load("a", PATH).name == "a"


def test_a_branch_is_resolved_now_or_the_load_fails(
    registry: _Make, hub: FakeHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = registry("acme")
    loaded = one.load("a", PATH)
    hub.status = 503
    with pytest.raises(errors.HubUnavailableError, check=says("HUB_STATUS", status=503)):
        one.replace("a", PATH)
    # The commit is cached, and offline, the last known commit of the branch is used.
    assert one.replace("a", loaded.source) == loaded
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert one.replace("a", PATH) == loaded
    with pytest.raises(errors.HubUnavailableError, check=says("HUB_OFFLINE")):
        one.load("b", "hub:acme/b")


def test_repositories_without_an_adapter_are_rejected(registry: _Make, repo: Repo) -> None:
    one, files = registry("acme"), repo.commits[repo.refs["main"]]
    repo.push({"config.json": b"{}"})
    refused(one, PATH, errors.AdapterCheckpointError, "NOT_AN_ADAPTER")
    repo.push({f"checkpoint-9/{name}": data for name, data in files.items()})
    refused(one, PATH, errors.AdapterCheckpointError, "ADAPTER_BELOW_TOP", folder="checkpoint-9")
    repo.push({"adapter_config.json": b"{}", "adapter_model.bin": b""})
    refused(one, PATH, errors.AdapterCheckpointError, "PICKLE")


def test_files_pass_the_checks_of_local_ones(registry: _Make, repo: Repo) -> None:
    files = repo.commits[repo.refs["main"]]
    repo.push({**files, "adapter_config.json": b'{"peft_type": "LORA", "r": 4, "odd": 1}'})
    refused(registry("acme"), PATH, errors.AdapterCheckpointError, "UNKNOWN_FIELD")
    refused(registry("acme"), PATH, errors.AdapterCheckpointError, "FINDING", field="odd")
    cut = files["adapter_model.safetensors"][:-1]
    repo.push({**files, "adapter_model.safetensors": cut})
    refused(registry("acme"), PATH, errors.AdapterCheckpointError, "FILE_CUT_SHORT")


def test_cached_adapters_are_checked_before_the_model_is_loaded(
    hub: FakeHub, registry: _Make, repo: Repo
) -> None:
    files = repo.commits[repo.refs["main"]]
    repo.push({**files, "adapter_config.json": b'{"peft_type": "LROA"}'})
    config = Config(
        listen=ListenConfig(address="127.0.0.1:0", metrics_address=None),
        adapters=AdapterConfig(adapter_hub=("acme",), preload=(("a", PATH),)),
    )
    assert problems(config) == []
    refused(registry("acme"), PATH, errors.AdapterCheckpointError, "UNKNOWN_METHOD", value="LROA")
    (problem,) = problems(config)
    assert says("UNKNOWN_METHOD", value="LROA")(problem.text)
    # A commit needs no query to the hub.
    path = f"{PATH}@{repo.refs['main']}"
    hub.requests.clear()
    adapters = dataclasses.replace(config.adapters, preload=(("a", path),))
    (problem,) = problems(dataclasses.replace(config, adapters=adapters))
    assert says("UNKNOWN_METHOD", value="LROA")(problem.text)
    assert hub.requests == []


def test_the_size_is_checked_before_the_download(registry: _Make, hub: FakeHub, repo: Repo) -> None:
    one = registry("acme", max_bytes=1000)
    refused(one, PATH, errors.BudgetExceededError, "UPLOAD_TOO_LARGE", max_upload_bytes=1000)
    assert hub.downloads() == []


def test_a_chat_template_is_checked_before_the_weights(
    registry: _Make, hub: FakeHub, repo: Repo, tmp_path: Path
) -> None:
    """Cached weights do not hide a missing template."""
    commit = repo.push({**repo.commits[repo.refs["main"]], "chat_template.jinja": b"{{ x }}"})
    one = registry("acme")
    loaded = one.load("a", PATH)
    assert loaded.facts.chat_template
    assert hub.downloads()[-1] == "adapter_model.safetensors"
    (template,) = (tmp_path / "hub").glob(f"*/snapshots/{commit}/chat_template.jinja")
    template.unlink()
    assert one.load("b", PATH).facts.chat_template == loaded.facts.chat_template


def test_a_file_missing_from_xet_counts_once(registry: _Make, hub: FakeHub, repo: Repo) -> None:
    hub.has_xet = True
    assert registry("acme", max_bytes=1 << 20).load("a", PATH).name == "a"
    assert any("/xet-storage/" in line for line in hub.requests)


def test_a_hub_that_sends_more_than_announced_is_rejected(
    registry: _Make, hub: FakeHub, repo: Repo
) -> None:
    repo.lied_sizes["adapter_model.safetensors"] = 10
    one = registry("acme", max_bytes=5000)
    refused(one, PATH, errors.HubUnavailableError, "HUB_SENT_TOO_MUCH")


def test_a_slow_hub_does_not_block_the_caller(
    registry: _Make, hub: FakeHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_adapters, "LEAST_SECONDS", 0.3)
    one = registry("acme")
    hub.seconds_per_chunk = 0.2
    refused(one, PATH, errors.HubUnavailableError, "HUB_TOO_SLOW")
    hub.seconds_per_chunk = 0.0
    monkeypatch.setattr(hub_adapters, "LEAST_SECONDS", 30.0)
    assert one.load("a", PATH).name == "a"


def test_a_full_disk_is_reported(
    registry: _Make, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = registry("acme")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_adapters, "download", full)
        refused(one, PATH, errors.StorageFullError, "DISK_FULL")
    assert one.load("a", PATH).name == "a"


def test_concurrent_downloads_are_limited(
    registry: _Make, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_adapters, "MAX_DOWNLOADS", 1)
    one = registry("acme")
    going, go = threading.Event(), threading.Event()

    def wait(*args: object) -> None:
        going.set()
        assert go.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr(hub_adapters, "download", wait)
        thread = threading.Thread(target=load_in_vain, args=(one,))
        thread.start()
        assert going.wait(20)
        refused(one, PATH, errors.QueueFullError, "TOO_MANY_DOWNLOADS", most=1)
        go.set()
        thread.join()
    assert one.load("a", PATH).name == "a"
