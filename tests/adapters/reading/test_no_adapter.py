"""Directories and files that are not adapters: loading and startup report the same, with advice."""

from __future__ import annotations

import json
import os
import pwd
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from said import says

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.command.preflight import problems
from turret.server.config import AdapterConfig, Config, ListenConfig
from turret.server.errors import AdapterCheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"


def refused(root: Path | None, path: str) -> AdapterCheckpointError:
    with pytest.raises(AdapterCheckpointError) as caught:
        read_checkpoint(AdapterRoot(root), path, max_elements=1 << 20)
    return caught.value


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


# A change to an adapter, the reported field, and the reason.
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (without(CONFIG_FILE), "path", "NOT_AN_ADAPTER"),
    "no weights": (without(TENSORS_FILE), TENSORS_FILE, "MISSING_FILE"),
    "half a trainer's checkpoint": (
        others_in_the_place_of_weights("optimizer.pt", "rng_state_0.pth", "training_args.bin"),
        TENSORS_FILE,
        "MISSING_FILE",
    ),
    "a pickle among a trainer's": (
        others_in_the_place_of_weights("optimizer.pt", "adapter_model.bin"),
        "adapter_model.bin",
        "PICKLE",
    ),
    "a GGUF file": (gguf, "path", "WHOLE_MODEL"),
    "a whole model": (whole_model, "path", "WHOLE_MODEL"),
    "a pointer": (pointer(TENSORS_FILE), TENSORS_FILE, "LFS_POINTER"),
    "a pointer of a config": (pointer(CONFIG_FILE), CONFIG_FILE, "LFS_POINTER"),
    "a config that was cut": (cut(CONFIG_FILE, 9), CONFIG_FILE, "NOT_JSON"),
    "weights that were cut": (cut(TENSORS_FILE, 90), TENSORS_FILE, "FILE_CUT_SHORT"),
    "one byte too few": (cut(TENSORS_FILE, -1), TENSORS_FILE, "FILE_CUT_SHORT"),
    "no bytes": (cut(TENSORS_FILE, 0), TENSORS_FILE, "FILE_CUT_SHORT"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one complete adapter, ``m``."""
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
def test_a_load_and_a_start_report_the_same_error(root: Path, kind: str) -> None:
    spoil, field, reason = FAULTS[kind]
    spoil(root / "m")
    error = refused(root, "m")
    assert [(name, why.reason) for name, why in error.violations] == [(field, reason)]
    assert error.message in said_by_a_start(root, "m")


def test_for_a_directory_far_above_an_adapter_the_adapter_is_suggested(root: Path) -> None:
    write_adapter(root / "saves" / "MODEL" / "lora" / "sft")
    meant = says("NOT_AN_ADAPTER", closest="saves/MODEL/lora/sft")
    for above in ("saves", "saves/MODEL", "saves/MODEL/lora"):
        error = refused(root, above)
        assert meant(error)
        assert error.message in said_by_a_start(root, above)
    # The nearest adapters are suggested.
    write_adapter(root / "saves" / "other")
    assert says("NOT_AN_ADAPTER", closest="saves/other")(refused(root, "saves"))
    # Directories behind a link are not searched.
    (root / "links").mkdir()
    (root / "links" / "a").symlink_to(root / "saves")
    ((_, why),) = refused(root, "links").violations
    assert (why.reason, why.params.get("closest")) == ("NOT_AN_ADAPTER", None)


@pytest.mark.parametrize("locked", ["m", f"m/{CONFIG_FILE}", f"m/{TENSORS_FILE}", ""])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o711])
def test_an_unreadable_file_is_reported_with_the_user(locked: str, mode: int) -> None:
    # A directory that every user may enter, unlike pytest's.
    with pretending_not_to_be_root() as user, tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        write_adapter(root / "m")
        (root / locked).chmod(mode)
        try:
            # Files can be read even if their directory cannot be listed.
            if mode & (0o100 if (root / locked).is_dir() else 0o400):
                assert read_checkpoint(AdapterRoot(root), "m", max_elements=1 << 20)
            else:
                assert says("READ_FORBIDDEN", user=user)(refused(root, "m"))
        finally:
            (root / locked).chmod(0o755)


def test_suggestions_skip_unreadable_directories(tmp_path: Path) -> None:
    with pretending_not_to_be_root(), tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        write_adapter(root / "hotel" / "adapter")
        (root / "link").symlink_to(root / "hotel" / "adapter")
        (root / "hotel").chmod(0o000)
        try:
            for path in ("hotl/adapter", "quite another"):
                ((_, why),) = refused(root, path).violations
                assert why.reason == "NO_SUCH_PATH"
                assert why.params.get("closest") != "hotel/adapter"
        finally:
            (root / "hotel").chmod(0o755)


@contextmanager
def pretending_not_to_be_root() -> Iterator[str]:
    """Run the block as another user, because root may read everything."""
    user = os.geteuid()
    if user:
        yield pwd.getpwuid(user).pw_name
        return
    nobody = pwd.getpwnam("nobody")
    # Files created in the block belong to the user nobody, with that user's permissions.
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        before, tempfile.tempdir = tempfile.tempdir, folder
        os.seteuid(nobody.pw_uid)
        try:
            yield nobody.pw_name
        finally:
            os.seteuid(user)
            tempfile.tempdir = before
