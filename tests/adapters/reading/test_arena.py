"""Operators in one block: the same values, without gaps or other retained memory."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from builders import operators
from builders.registries import tiny_base
from safetensors.torch import save_file
from said import says

from turret.server.adapters.adapter import Source
from turret.server.adapters.checkpoint import AdapterCheckpoint, adapter_root, reader
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot, DigestCache, stamp_of
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.loader import AdapterLoader
from turret.server.adapters.lowering import in_one_block
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.errors import AdapterChangedError, AdapterCheckpointError


def low_rank(rank: int, size: int) -> LowRank:
    # Views of a larger tensor, like the tensors of a file.
    wide = torch.randn(2 * rank, size).bfloat16()
    return LowRank(wide[:rank], wide[rank:])


def one_of_each() -> dict[str, ModuleOperators]:
    shared = torch.randn(3, 24).bfloat16()
    made = {
        f"{number}": ModuleOperators(*(make(48, 24, torch.bfloat16) for make in makes))
        for number, makes in enumerate(
            [
                (operators.low_rank(3), operators.gain),
                (operators.low_rank(0),),
                (operators.kronecker(8, 4),),
                (operators.kronecker(8, 4, 2),),
                (operators.gate(3, 4, 16), operators.input_gain, operators.bias),
                (operators.router(3, 4, 16),),
                (operators.dense,),
                (operators.sparse(30),),
            ]
        )
    }
    made["shared"] = ModuleOperators(Hadamard(shared, shared, *torch.randn(2, 9, 3)))
    return made


def test_every_operator_keeps_its_values_in_one_storage() -> None:
    before = one_of_each()
    after, is_finite = in_one_block(before)
    assert is_finite
    assert list(after) == list(before)
    storages = set()
    for name, module in before.items():
        copied = after[name]
        assert list(map(type, module.operators)) == list(map(type, copied.operators))
        assert len(module.tensors()) == len(copied.tensors())
        for old, new in zip(module.tensors(), copied.tensors(), strict=True):
            assert torch.equal(old, new)
            assert old.dtype == new.dtype
            assert new.is_contiguous()
            if new.numel():
                storages.add(new.untyped_storage().data_ptr())
    assert len(storages) == 1
    gate, moved = before["4"].get(Gate), after["4"].get(Gate)
    assert gate is not None
    assert moved is not None
    assert gate.rank_indptr == moved.rank_indptr
    both = after["shared"].get(Hadamard)
    assert both is not None
    assert both.w1a is both.w1b  # a shared tensor is stored once


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_detected(value: float) -> None:
    for place in range(3):
        modules = {str(i): ModuleOperators(low_rank=low_rank(2, 64)) for i in range(3)}
        changed = modules[str(place)].low_rank
        assert changed is not None
        changed.b[1, 63] = value
        assert not in_one_block(modules)[1]


def test_a_block_is_no_larger_than_its_tensors() -> None:
    ranks = (1, 3, 8, 16, 64)
    modules = {
        f"{i}": ModuleOperators(low_rank=low_rank(ranks[i % 5], 64 + 8 * i)) for i in range(60)
    }
    after, _ = in_one_block(modules)
    tensors = [tensor for module in after.values() for tensor in module.tensors()]
    block = tensors[0].untyped_storage().nbytes()
    assert block <= 1.05 * sum(tensor.nbytes for tensor in tensors)


# An adapter that is read again is hashed again if and only if its files may have changed.


TENSORS = "adapter_model.safetensors"


def write(folder: Path, seed: int, alpha: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    save_file({"a": torch.randn(4, 4)}, folder / TENSORS)
    (folder / "adapter_config.json").write_text(json.dumps({"alpha": alpha}))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of hashed bytes, one per piece; files count as settled at once."""
    monkeypatch.setattr(adapter_root, "_SETTLED_SECONDS", 0.0)
    pieces: list[int] = []
    begin = reader.begin_digest

    class Counting:
        def __init__(self, config: object) -> None:
            self._digest = begin(config)  # type: ignore[arg-type]

        def update(self, data: bytes) -> None:
            pieces.append(len(data))
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(reader, "begin_digest", Counting)
    return pieces


def read(folder: Path, known: DigestCache | None) -> AdapterCheckpoint:
    root = AdapterRoot(folder.parent)
    return read_checkpoint(root, folder.name, max_elements=1000, known=known)


def test_unchanged_files_are_hashed_once(tmp_path: Path, hashed: list[int]) -> None:
    write(tmp_path / "a", 0)
    known = DigestCache()
    first = read(tmp_path / "a", known)
    count = len(hashed)
    assert count
    again = read(tmp_path / "a", known)
    assert len(hashed) == count
    assert again.digest == first.digest == read(tmp_path / "a", None).digest
    assert torch.equal(again.tensors["a"], first.tensors["a"])
    os.link(tmp_path / "a" / TENSORS, tmp_path / "link")  # updates the file's time of change
    assert read(tmp_path / "a", known).digest == first.digest
    assert len(hashed) > count


def test_changed_content_of_the_same_size_and_time_is_noticed(
    tmp_path: Path, hashed: list[int]
) -> None:
    folder = tmp_path / "a"
    write(folder, 0)
    known = DigestCache()
    first = read(folder, known)
    file = folder / TENSORS
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    while (
        file.stat().st_ctime_ns == before.st_ctime_ns
        or file.stat().st_mtime_ns > before.st_mtime_ns
    ):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read(folder, known).digest != first.digest


def test_a_cached_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    write(folder, 0)
    known = DigestCache()
    read(folder, known)
    original = reader._read_data

    def changing(file: BinaryIO, num_bytes: int) -> torch.Tensor | None:
        with (folder / TENSORS).open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"x")
        return original(file, num_bytes)

    monkeypatch.setattr(reader, "_read_data", changing)
    with pytest.raises(AdapterCheckpointError, check=says("FILE_CHANGED")):
        read(folder, known)


def test_a_changed_config_is_noticed(tmp_path: Path, hashed: list[int]) -> None:
    write(tmp_path / "a", 0)
    known = DigestCache()
    first = read(tmp_path / "a", known)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"alpha": 2}))
    assert read(tmp_path / "a", known).digest != first.digest


def loader_of(folder: Path) -> AdapterLoader:
    for name in ("root", "state"):
        (folder / name).mkdir(mode=0o700)
        write(folder / name / "a", 0)
    return AdapterLoader(folder / "root", tiny_base(), 1 << 20, 8, uploads=folder / "state")


def test_only_uploads_are_cached(tmp_path: Path, hashed: list[int]) -> None:
    loader = loader_of(tmp_path)
    for is_upload, is_hashed_again in ((True, False), (False, True)):
        source = Source("a", is_upload=is_upload)
        loader.read(source)
        hashed.clear()
        loader.read(source)
        assert bool(hashed) is is_hashed_again, source


def test_uploads_are_not_cached_if_others_may_write(tmp_path: Path, hashed: list[int]) -> None:
    for name in ("root", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "state").chmod(0o770)
    write(tmp_path / "state" / "a", 0)
    loader = AdapterLoader(None, tiny_base(), 1 << 20, 8, uploads=tmp_path / "state")
    loader.read(Source("a", is_upload=True))
    hashed.clear()
    loader.read(Source("a", is_upload=True))
    assert hashed


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_weights_changed_through_a_mapping_are_detected(
    tmp_path: Path, hashed: list[int], place: str
) -> None:
    """Mapped pages can be written a second time without a change of the file's times."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path
        if place == "memory":
            name = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
            folder = Path(name)
        loader = loader_of(folder)
        source = Source("a")
        file = stack.enter_context((folder / "root" / "a" / TENSORS).open("r+b"))
        mapping = stack.enter_context(mmap.mmap(file.fileno(), 0))
        mapping[-1] = mapping[-1]
        digest = loader.read(source).digest
        mapping[-1] ^= 1
        with pytest.raises(AdapterChangedError):
            loader.reload("a", source, digest)


def test_recently_changed_files_have_no_stamp(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    with file.open() as opened:
        assert stamp_of(opened.fileno()) is None


def test_the_least_recently_used_digest_is_forgotten() -> None:
    known = DigestCache(max_entries=2)
    for name in (b"a", b"b"):
        known.remember(name, name.decode())
    assert known.find(b"a") == "a"
    known.remember(b"c", "c")
    known.remember(None, "d")
    assert [known.find(name) for name in (b"a", b"b", b"c", None)] == ["a", None, "c", None]
