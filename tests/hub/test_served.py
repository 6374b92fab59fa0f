"""A server with model and adapters from the hub; only ``HF_ENDPOINT`` and ``HF_HOME`` are set."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.adapters import edit_config
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from servers.fake_hub import FakeHub, environment
from servers.server_under_test import start_server

from turret.clients.client import TurretClient


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
