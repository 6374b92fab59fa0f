"""The C kernels without Python, for every instruction set of this machine and for aarch64 (qemu).

``native_checks.c`` compares each exported function with loops in double precision, and each row
alone with the same row in a batch. The planted faults below, one per build, show that the checks
can fail.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from turret.kernels import cpu as native
from turret.kernels.cpu.isas import FLAGS, ISA_FLAGS

FOLDER = Path(__file__).resolve().parents[3] / "kernels" / "cpu" / "c"
CHECKS = Path(__file__).parent / "native_checks.c"

# Tiles in plain C, with instructions that this processor has.
TILE_FLAGS = [
    *ISA_FLAGS["avx512_bf16"],
    *("-O2", "-DTILES_EMULATED", f"-I{Path(__file__).parent}"),
]

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
AARCH64 = "aarch64-linux-gnu-gcc"
QEMU = next((name for name in ("qemu-aarch64", "qemu-aarch64-static") if shutil.which(name)), None)


def build(
    out: Path, *more: str, compiler: str = "cc", checks: Path = CHECKS, kernels: list[Path]
) -> Path:
    """Build the checks with ``kernels``: a library, the sources of all kernels, or none."""
    flags = [f for f in FLAGS if "visibility" not in f]
    files = [str(path) for path in (checks, *kernels)]
    command = [compiler, *flags, *more, f"-I{FOLDER}", *files, "-o", str(out), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


def assert_no_failures(*command: str) -> str:
    """Run the checks with several numbers of threads; returns the output of the last run."""
    for threads in (["1"], ["3"], ["3", "own"]):
        result = subprocess.run(
            [*command, *threads], capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "0 failures" in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def compiled_checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled checks, for any library."""
    return build(tmp_path_factory.mktemp("checks") / "checks.o", "-c", kernels=[])


@needs_cc
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_the_checks_pass_natively(isa: str, tmp_path: Path, compiled_checks: Path) -> None:
    if isa not in native.usable_isas():
        pytest.skip(f"this processor or compiler does not have {isa}")
    library = native.path_of(isa)
    assert library is not None
    checks = build(tmp_path / "checks", checks=compiled_checks, kernels=[library])
    assert_no_failures(str(checks))


@needs_cc
def test_the_checks_pass_on_emulated_tiles(tmp_path: Path, compiled_checks: Path) -> None:
    """On processors with tiles, the bits of the wide products are the same."""
    if "avx512_bf16" not in native.usable_isas():
        pytest.skip("this processor or compiler does not have avx512_bf16")
    emulated = build(tmp_path / "emulated", *TILE_FLAGS, kernels=sorted(FOLDER.rglob("*.c")))
    printed = assert_no_failures(str(emulated))
    if "amx" in native.usable_isas():
        library = native.path_of("amx")
        assert library is not None
        real = build(tmp_path / "real", checks=compiled_checks, kernels=[library])
        assert assert_no_failures(str(real)) == printed


@pytest.mark.long
@pytest.mark.skipif(shutil.which(AARCH64) is None, reason=f"{AARCH64} is not installed")
@pytest.mark.skipif(QEMU is None, reason="qemu-user is not installed")
def test_the_checks_pass_on_aarch64(tmp_path: Path) -> None:
    assert QEMU is not None
    kernels = sorted(FOLDER.rglob("*.c"))
    checks = build(tmp_path / "checks", "-O2", "-static", compiler=AARCH64, kernels=kernels)
    assert_no_failures(QEMU, str(checks))


FAULTS = {
    "an even row in place of the odd row after it": ("products.h",
        "xs[i] = x + (i < rows ? i : rows - 1) * p->x_row;",
        "xs[i] = x + (i < rows ? i / 2 * 2 : rows - 1) * p->x_row;"),
    "a single last input left out": ("products.h", "if (k < n) {", "if (k + 1 < n) {"),
    "an even input in place of the odd one after it": ("nf4_vectors.h", "x[r * BLOCK + odd] -",
                                                       "x[r * BLOCK] -"),
    "halves of the outputs in the wrong order": ("nf4_product.c", "0xd8", "0xe4"),
    "another expert's factors": ("adapters/experts.c", ".b = u->b + expert *",
                                 ".b = u->b + (expert ^ 1) *"),
    "a window one too long": ("attention.c", "number + 1 - plan->window;",
                              "number - plan->window;"),
    "half of a head rotated the other way": ("elementwise.c", "b * c + a * s", "b * c - a * s"),
    "all sums added to the first output of a vector": ("adapters/sparse.c",
        "s->outputs[low + i + lane]", "s->outputs[low + i]"),
    "the first entries of each output twice, the second ones never": ("adapters/sparse.c",
        "sums[n * SLOTS + LANES + lane]", "sums[n * SLOTS + lane]"),
    "bounds of a piece without rounding errors": ("screen.c", "value + error", "value"),
    "bounds of an output without rounding errors": ("screen.c", "rows[r].per_scale >= limits",
                                                    "0 >= limits"),
    "another output's scale": ("screen.c", "j->scales[tile * TILE + i] =",
                               "j->scales[tile * TILE + (i ^ 1)] ="),
    "the inputs of a pair swapped": ("screen.c", "pair[i] =", "pair[1 - i] ="),
    "skipped blocks of inputs not counted": ("adapters/sparse.c", "(uint16_t)(block - last)", "0"),
    "a transposed weight of another output": ("nf4_product.c", "(to[i + j] + k)",
                                              "(to[i + (j ^ 1)] + k)"),
    "attention to a later position in the gradient": ("gradients.c", "first, t + 1);",
                                                      "first, t + 2);"),
    "only the last slice's gradient of x": ("products.c", ".adds = 1}", ".adds = 0}"),
    "the gradient of a target's logit without the one": ("logits.c", "to_bf16(slope - share",
                                                         "to_bf16(-share"),
}  # fmt: skip

TILE_FAULTS = {
    "rows of two overlapping groups added twice": ("nf4_tiles.h",
        "(groups - 1) * group - last, group", "0, group"),
    "weights of the block before": ("nf4_tiles.h", "weights[b % 2]", "weights[(b + 1) % 2]"),
    "the last row left out": ("dense_tiles.h", "v[r] = first + r < p->rows",
                              "v[r] = first + r < p->rows - 1"),
    "the lower halves of rank activations left out": ("adapters/low_rank_tiles.h",
        "high, _mm512_slli_epi32(low, 16)", "high, high"),
    "the factor's entries for the inputs before": ("adapters/low_rank_tiles.h",
        "*now = transposed[i % 2]", "*now = transposed[(i + 1) % 2]"),
    "second tile of rows one row too early": ("adapters/low_rank_tiles.h",
        "acc + TILE_ROWS * COLUMNS,", "acc + (TILE_ROWS - 1) * COLUMNS,"),
    "a row alone summed in another order": ("adapters/low_rank_tiles.h", "odd[j] += rest",
                                            "even[j] += rest"),
    "a row alone keeps subnormal numbers": ("adapters/low_rank_tiles.h",
        "before | SUBNORMALS_ARE_ZERO", "before"),
    "a key after the query's position": ("attention_tiles.h",
        "p->span->num_context + number + 1 - t;", "p->span->num_context + number + 2 - t;"),
    "values after the last key": ("attention_tiles.h", "t + i >= p->low && t + i < p->end", "1"),
    "sums over earlier outputs forgotten": ("transposed.h", "if (first) {", "if (first < 0) {"),
}  # fmt: skip


class Objects:
    """The checks and all kernels, compiled one by one; a fault recompiles only its file."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self._flags = [*(f for f in FLAGS if "visibility" not in f), *flags]
        self._folder = folder
        self._sources = {path.relative_to(FOLDER): path for path in sorted(FOLDER.rglob("*.c"))}
        self._checks = self._compile(CHECKS, FOLDER, folder / "checks.o")
        self._kernels = {
            name: self._compile(path, FOLDER, self._object(folder, name))
            for name, path in self._sources.items()
        }

    def with_fault(self, name: str, right: str, wrong: str, folder: Path) -> Path:
        """Build the checks after replacing one text in a file of the kernels."""
        copy = folder / "cpu"
        shutil.copytree(FOLDER, copy)
        text = (copy / name).read_text()
        assert right in text
        (copy / name).write_text(text.replace(right, wrong))
        parts, anew = [self._checks], 0
        for source, found in self._kernels.items():
            if str(FOLDER / name) in found.with_suffix(".d").read_text().split():
                found = self._compile(copy / source, copy, self._object(folder, source))
                anew += 1
            parts.append(found)
        assert anew
        program = folder / "checks"
        self._run(*map(str, parts), "-o", str(program), "-lm")
        return program

    @staticmethod
    def _object(folder: Path, source: Path) -> Path:
        return folder / f"{'_'.join(source.parts)}.o"

    def _compile(self, source: Path, include: Path, out: Path) -> Path:
        self._run("-MMD", f"-I{include}", "-c", str(source), "-o", str(out))
        return out

    def _run(self, *arguments: str) -> None:
        command = ["cc", *self._flags, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    flags = ISA_FLAGS["avx2"] if "avx2" in native.usable_isas() else ()
    return Objects(tmp_path_factory.mktemp("plain"), [*flags, "-O1"])


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    if "avx512_bf16" not in native.usable_isas():
        pytest.skip("this processor or compiler does not have avx512_bf16")
    return Objects(tmp_path_factory.mktemp("tiles"), TILE_FLAGS)


@needs_cc
@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, plain: Objects) -> None:
    assert_fails(plain.with_fault(*FAULTS[fault], tmp_path))


@needs_cc
@pytest.mark.long
@pytest.mark.parametrize("fault", TILE_FAULTS)
def test_a_planted_fault_of_tiles_is_found(fault: str, tmp_path: Path, tiles: Objects) -> None:
    assert_fails(tiles.with_fault(*TILE_FAULTS[fault], tmp_path))


def assert_fails(checks: Path) -> None:
    assert subprocess.run([str(checks), "1"], capture_output=True, check=False).returncode == 1
