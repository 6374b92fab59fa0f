"""The threads that share a kernel's work: ``team_checks.c``, alone and under a race detector."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from turret.kernels import cpu as native
from turret.kernels.cpu import num_threads, use_own_threads
from turret.server.basics.work import compute_on_this_thread

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "kernels" / "cpu" / "c"
CHECKS = Path(__file__).parent / "team_checks.c"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def build(folder: Path, *flags: str, source: Path = FOLDER / "team.c") -> Path:
    out = folder / "checks"
    files = [str(CHECKS), str(source)]
    command = ["cc", "-g", "-Wno-psabi", "-fopenmp", "-pthread", f"-I{FOLDER}", *flags, *files]
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, text=True)
    return out


def run(checks: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {"TSAN_OPTIONS": "die_after_fork=0"}
    return subprocess.run(
        [str(checks), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=environment,
    )


def test_every_piece_is_computed_once(tmp_path: Path) -> None:
    checks = build(tmp_path, "-O2")
    for threads in ("1", "2", "3", "8"):
        result = run(checks, threads)
        assert result.returncode == 0, result.stdout
        assert f"team of {threads}: 0 failures" in result.stdout


@pytest.fixture
def sanitizer(tmp_path: Path) -> str:
    try:
        build(tmp_path, "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no race detector")
    return "-fsanitize=thread"


def test_there_are_no_data_races(tmp_path: Path, sanitizer: str) -> None:
    checks = build(tmp_path, "-O1", sanitizer)
    for threads in ("2", "7"):
        result = run(checks, threads, "own")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "WARNING" not in result.stderr


FAULTS = {
    "two threads claim a piece": (
        """    while (next >> PIECE_BITS == number && PIECE(next) < end)
        if (atomic_compare_exchange_weak_explicit(&share->next, &next, next + 1,
                                                  memory_order_acq_rel, memory_order_acquire))
            return (int64_t)PIECE(next);""",
        """    if (next >> PIECE_BITS == number && PIECE(next) < end) {
        atomic_store(&share->next, next + 1);
        return (int64_t)PIECE(next);
    }""",
    ),
    "the caller does not wait": (
        "(done = atomic_load(&team.done)) != (uint32_t)pieces;) {",
        "done = atomic_load(&team.done), 0;) {",
    ),
}


# With this fault, the check waits for more pieces than exist.
HANGS = "two threads claim a piece"


# Faults that show where a worker is stopped.
FAULTS_OF_STOPS = {
    "a worker goes on with a piece that was taken": ("    siglongjmp(own->before, 1);\n", ""),
    "no piece is taken": ("held >> PIECE_BITS != number ||", "held >> PIECE_BITS == number ||"),
}


def with_fault(folder: Path, right: str, wrong: str) -> Path:
    text = (FOLDER / "team.c").read_text()
    assert right in text
    (folder / "team.c").write_text(text.replace(right, wrong))
    return folder / "team.c"


@pytest.mark.parametrize("fault", FAULTS_OF_STOPS)
def test_a_planted_fault_in_taking_over_is_found(fault: str, tmp_path: Path) -> None:
    checks = build(tmp_path, "-O2", source=with_fault(tmp_path, *FAULTS_OF_STOPS[fault]))
    for _ in range(
        10
    ):  # a worker may be stopped between two pieces, where the faults change nothing
        result = run(checks, "2")
        if result.returncode != 0:
            assert result.returncode == 1
            assert "a stopped worker" in result.stdout
            return
    pytest.fail("ten runs did not find the fault")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, sanitizer: str) -> None:
    checks = build(tmp_path, "-O1", sanitizer, source=with_fault(tmp_path, *FAULTS[fault]))
    for _ in range(10):  # whether a race shows depends on which thread the system runs when
        try:
            result = run(checks, "7", "own", timeout=8 if fault == HANGS else 300)
        except subprocess.TimeoutExpired:
            assert fault == HANGS
            return
        if result.returncode != 0 or "WARNING" in result.stderr:
            return
    pytest.fail("ten runs did not find the fault")


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_a_thread_uses_its_own_number_of_threads_or_that_of_torch() -> None:
    found: list[int] = []

    def compute() -> None:
        found.append(num_threads())
        use_own_threads()
        compute_on_this_thread()
        found.extend((num_threads(), torch.get_num_threads()))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found == [torch.get_num_threads(), torch.get_num_threads(), 1]
    assert num_threads() == torch.get_num_threads()
