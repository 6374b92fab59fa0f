"""Directories and files that are no adapter's: a load and a start say the same, and what to do."""

from __future__ import annotations

import json
import os
import pwd
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.source import CONFIG_FILE, TENSORS_FILE
from turret.server.command.preflight import problems
from turret.server.config import AdapterConfig, Config, ListenConfig
from turret.server.errors import AdapterCheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
AGAIN = "copy the file again, or have PEFT save the adapter again$"


def said_by_a_load(root: Path | None, path: str) -> str:
    with pytest.raises(AdapterCheckpointError) as refused:
        read_checkpoint(AdapterRoot(root), path, max_elements=1 << 20)
    return str(refused.value)


def said_by_a_start(root: Path, path: str) -> str:
    adapters = AdapterConfig(adapter_root=root, preload=(("a", path),))
    listen = ListenConfig(address="127.0.0.1:0", metrics_address=None)
    (problem,) = problems(Config(adapters=adapters, listen=listen))
    assert problem.field == "adapters.preload.a"
    return problem.text


def whole_model(folder: Path) -> None:
    for file in (CONFIG_FILE, TENSORS_FILE):
        (folder / file).unlink()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").touch()


def gguf(folder: Path) -> None:
    whole_model(folder)
    (folder / "m-Q4_K_M.gguf").touch()


def others_in_the_place_of_weights(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / TENSORS_FILE).unlink()
        for name in names:
            (folder / name).touch()

    return spoil


def cut(file: str, size: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return spoil


def pointer(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).write_bytes(POINTER)

    return spoil


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (
        without(CONFIG_FILE),
        "is no adapter: there is no adapter_config.json in it; name the directory that PEFT's",
    ),
    "no weights": (
        without(TENSORS_FILE),
        f"has adapter_config.json, but no adapter_model.safetensors; {AGAIN}",
    ),
    "half a trainer's checkpoint": (
        others_in_the_place_of_weights("optimizer.pt", "rng_state_0.pth", "training_args.bin"),
        f"has adapter_config.json, but no adapter_model.safetensors; {AGAIN}",
    ),
    "a pickle among a trainer's": (
        others_in_the_place_of_weights("optimizer.pt", "adapter_model.bin"),
        "cannot be served: adapter_model.bin: is a pickle, which .* writes adapter_model.saf",
    ),
    "a GGUF file": (gguf, "is no adapter: m-Q4_K_M.gguf is a whole model, which `turret serve --m"),
    "a whole model": (whole_model, "is a whole model, not an adapter: `turret serve --model` take"),
    "a pointer": (pointer(TENSORS_FILE), "safetensors: is a Git LFS pointer, .* `git lfs pull` in"),
    "a pointer of a config": (pointer(CONFIG_FILE), "config.json: is a Git LFS pointer, not the f"),
    "a config that was cut": (cut(CONFIG_FILE, 9), f"config.json: is not valid JSON: .*; {AGAIN}"),
    "weights that were cut": (
        cut(TENSORS_FILE, 90),
        f"is cut short: it has [0-9]+ bytes, its header alone [0-9]+; {AGAIN}",
    ),
    "one byte too few": (cut(TENSORS_FILE, -1), f"tensors end at 192, the data at 191; {AGAIN}"),
    "no bytes": (cut(TENSORS_FILE, 0), f"is too short for a safetensors file; {AGAIN}"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter whose files are whole, ``m``."""
    write_adapter(tmp_path / "m")
    return tmp_path


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    values = {f"{name}_A.weight": np.ones((4, 6), np.float32)}
    values[f"{name}_B.weight"] = np.ones((6, 4), np.float32)
    save_file(values, folder / TENSORS_FILE)
    keys = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(keys))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_load_and_a_start_say_what_is_wrong_and_what_to_do(root: Path, kind: str) -> None:
    spoil, expected = FAULTS[kind]
    spoil(root / "m")
    for said in (said_by_a_load(root, "m"), said_by_a_start(root, "m")):
        assert re.search(expected, said), said


def test_weights_that_are_no_numbers_are_told_with_what_to_do(root: Path) -> None:
    values = load_file(root / "m" / TENSORS_FILE)
    next(iter(values.values()))[0, 0] = np.nan
    save_file(values, root / "m" / TENSORS_FILE)
    assert "holds NaN or Inf; take a checkpoint from before that" in said_by_a_load(root, "m")


def test_directories_far_above_an_adapter_say_where_it_is(root: Path) -> None:
    write_adapter(root / "saves" / "MODEL" / "lora" / "sft")
    for above, below in (
        ("saves", "MODEL/lora/sft"),
        ("saves/MODEL", "lora/sft"),
        ("saves/MODEL/lora", "sft"),
    ):
        for said in (said_by_a_load(root, above), said_by_a_start(root, above)):
            meant = f"holds one; did you mean '{above}/{below}'?"
            assert f"path {above!r} is no adapter, but {meant}" in said
    # The nearest are meant.
    write_adapter(root / "saves" / "other")
    assert "did you mean 'saves/other'?" in said_by_a_load(root, "saves")
    # What only a link leads to is not searched.
    (root / "links").mkdir()
    (root / "links" / "a").symlink_to(root / "saves")
    assert "there is no adapter_config.json in it" in said_by_a_load(root, "links")


def test_one_of_the_files_stands_for_its_directory(root: Path) -> None:
    for path, folder in ((f"m/{TENSORS_FILE}", "m"), (f"m/{CONFIG_FILE}", "m")):
        said = said_by_a_load(root, path)
        assert said.endswith(f"; an adapter is the directory that holds its files, {folder!r}")
    (root / "notes.txt").touch()
    assert said_by_a_load(root, "notes.txt").endswith(
        "is not a directory; an adapter is the directory that has its adapter_config.json"
    )


@pytest.mark.parametrize("locked", ["m", f"m/{CONFIG_FILE}", f"m/{TENSORS_FILE}", ""])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o711])
def test_what_may_not_be_read_is_said_with_who_may_not(locked: str, mode: int) -> None:
    # In a place that every user may enter, which pytest's is not.
    with pretending_not_to_be_root() as user, tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        write_adapter(root / "m")
        (root / locked).chmod(mode)
        try:
            # A directory need not be listed for what is in it to be read.
            if mode & (0o100 if (root / locked).is_dir() else 0o400):
                assert read_checkpoint(AdapterRoot(root), "m", max_elements=1 << 20)
            else:
                said = said_by_a_load(root, "m")
                assert "cannot be read: Permission denied; let the server's user, " in said
                assert f"{user}, read it (`chmod -R a+rX`)" in said
        finally:
            (root / locked).chmod(0o755)


def test_what_is_near_may_be_locked(tmp_path: Path) -> None:
    with pretending_not_to_be_root(), tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        write_adapter(root / "hotel" / "adapter")
        (root / "link").symlink_to(root / "hotel" / "adapter")
        (root / "hotel").chmod(0o000)
        try:
            for path in ("hotl/adapter", "quite another"):
                said = said_by_a_load(root, path)
                assert "does not exist under the adapter root" in said
                assert "hotel/adapter" not in said
        finally:
            (root / "hotel").chmod(0o755)


@contextmanager
def pretending_not_to_be_root() -> Iterator[str]:
    """Root may read everything."""
    user = os.geteuid()
    if user:
        yield pwd.getpwuid(user).pw_name
        return
    nobody = pwd.getpwnam("nobody")
    # What is made in it is nobody's, and so are its rights to bear.
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        before, tempfile.tempdir = tempfile.tempdir, folder
        os.seteuid(nobody.pw_uid)
        try:
            yield nobody.pw_name
        finally:
            os.seteuid(user)
            tempfile.tempdir = before


def test_a_repository_of_the_hub_is_told_how_to_be_named(root: Path) -> None:
    hint = "; of the Hugging Face hub it is hub:acme/qwen-sql"
    assert said_by_a_load(root, "acme/qwen-sql").endswith(f"under the adapter root {root}{hint}")
    assert said_by_a_load(None, "acme/qwen-sql").endswith(f"without --adapter-root{hint}")
    assert hint in said_by_a_start(root, "acme/qwen-sql")
    # A directory that is there was meant.
    assert "hub:" not in said_by_a_load(root, "m/qwen-sql")
