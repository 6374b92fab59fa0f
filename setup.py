"""Builds the C libraries, and a single wheel for all Python versions.

The compiled libraries are plain C, which ctypes loads. They do not depend on the Python version, so
neither their names nor the wheel's name contain one: the wheel's tag is ``py3-none`` and the
platform. A copy of the repository without symbolic links cannot be built, and is rejected.
"""

import copy
import ctypes
import os
import runpy
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path(__file__).resolve().parent / "src" / "turret"
# The folders of the import package ``turret``: links in a checkout, real folders in an sdist.
FOLDERS = ("server", "kernels", "clients", "fleet", "training", "v1")

missing = [name for name in FOLDERS if not (PACKAGE / name).is_dir()]
if missing:
    raise SystemExit(
        f"src/turret/{missing[0]} is not a directory: this copy of turret has no symbolic links, so"
        " the package would be empty. Clone the repository with git (on Windows with"
        " 'git -c core.symlinks=true clone'), or use the .tar.gz, not the ZIP."
    )


def isas_of_this_machine(folder: Path, known: list[str]) -> list[str]:
    """The baseline and this machine's best instruction set; all known ones if detection fails."""
    with tempfile.TemporaryDirectory() as made:
        library = Path(made, "isa.so")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(library)]
        try:
            subprocess.run([*command, str(folder / "isa.c")], check=True, capture_output=True)
            return ["baseline", known[ctypes.CDLL(str(library)).turret_isa()]]
        except (OSError, subprocess.CalledProcessError):
            return known


def libraries() -> list[Extension]:
    """One library of C kernels per instruction set; the server loads the best one at startup.

    With ``TURRET_BUILD=machine``, only two libraries are built, in a fifth of the time: the best
    one for this machine, and the baseline's, which contains the function that detects the
    instruction set.
    """
    folder = Path("kernels", "cpu", "c")
    isas = runpy.run_path(str(PACKAGE / "kernels" / "cpu" / "isas.py"))
    built = list(isas["ISA_FLAGS"])
    sources = dict.fromkeys(built, sorted(map(str, folder.rglob("*.c"))))
    if os.environ.get("TURRET_BUILD") == "machine":
        built = isas_of_this_machine(folder, built)
        if len(set(built)) == 2:
            sources["baseline"] = [str(folder / "isa.c")]
    return [
        Extension(
            "turret.kernels.cpu._native" + ("" if isa == "baseline" else f"_{isa}"),
            sources[isa],
            depends=sorted(map(str, folder.rglob("*.h"))),
            include_dirs=[str(folder)],
            extra_compile_args=[*isas["FLAGS"], *flags],
            # Without a compiler, the package still installs, and torch computes instead.
            optional=True,
        )
        for isa, flags in isas["ISA_FLAGS"].items()
        if isa in built
    ]


class BuildLibraries(build_ext):
    """Builds libraries without a version tag in their names, with one compiler per processor."""

    def build_extensions(self) -> None:
        compile_some = self.compiler.compile

        def compile_at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_some([source], **options), sources)
                return [each for objects in made for each in objects]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext: Any) -> None:
        # The libraries share sources, and an object file has the name of its source, so use
        # separate folders.
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        # Python's own flags include debug information, which would be two thirds of a library.
        ext.extra_compile_args = [*ext.extra_compile_args, "-g0"]
        super(BuildLibraries, own).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # Remove libraries that were built in place with a version tag, which Python would find
        # first.
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            for stale in (PACKAGE / "kernels" / "cpu").glob(f"{name}.*-*.so"):
                stale.unlink()


class BuildWheel(bdist_wheel):
    """Tags the wheel for the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: Any = super().get_tag()
        return "py3", "none", tag[2]


setup(
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": BuildWheel},
)
