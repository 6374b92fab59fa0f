"""Refuses to build from a copy whose links are gone; pyproject.toml says everything else."""

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).resolve().parent / "src" / "turret"
# The folders of the import package ``turret``: links in a checkout, real folders in an sdist.
FOLDERS = ("server", "kernels", "clients", "training", "v1")

missing = [name for name in FOLDERS if not (PACKAGE / name).is_dir()]
if missing:
    raise SystemExit(
        f"src/turret/{missing[0]} is no folder: this copy of turret has no symbolic links, so the"
        " package would be empty. Clone the repository with git (on Windows with"
        " 'git -c core.symlinks=true clone'), or take the .tar.gz in place of the ZIP."
    )

setup()
