"""The one-way flow between the folders, and the limits on files and functions.

Imports count wherever they stand: inside functions and under ``TYPE_CHECKING`` too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

# Folder at the root → import name below ``turret``.
PACKAGES = {
    "kernels": "kernels",
    "server": "server",
    "clients": "clients",
    "training": "training",
    "proto/turret/v1": "v1",
}
CODE = (*PACKAGES, "bench", "tests", "examples")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

# Modules of server/ that any layer may use. They use each other and nothing else.
LEAVES = frozenset(f"server.{name}" for name in ("errors", "log", "config", "metrics"))
BASICS = "server.basics"
# The ``turret`` command. It alone may name the verbs of training, and nothing imports it but what
# loads it.
COMMAND = "server.cli"
ENTRY = "server.command.entry"
# ``server.adapters`` stands for the files directly in it, the nouns that all its rooms share.
NOUNS = {"server.adapters", "server.adapters.operators", "leaf"}
READING = {
    f"server.adapters.{name}"
    for name in (
        *("checkpoint", "lowering", "methods"),
        *(f"peft_format{room}" for room in ("", ".config", ".refusals", ".vocabulary")),
    )
}
METHOD_ROOMS = [
    f"server.adapters.methods.{name}"
    for name in ("lora", "low_rank", "transforms", "structured", "vectors", "prompts")
]
KEEPING = {f"server.adapters.{name}" for name in ("state", "residency")}
DEVICE = {f"server.adapters.device{room}" for room in ("", ".cpu", ".gpu")}
MODELS = {f"server.models{room}" for room in ("", ".families", ".sources", ".decoding", ".weights")}
BEHIND_API = {
    *("server.engine", "server.engine.scheduling", "server.constraints", "server.models", "v1"),
    *(f"server.adapters.{name}" for name in ("registry", "fuse", "merge", "state")),
}
# What a door opens onto.
API = {"server.api", *(f"server.api.{room}" for room in ("access", "admin", "inference"))}
# Layer → what of turret it may import beside itself. ``server`` stands for the other modules
# directly in server/, which put the parts together. The package's own __init__ (its version) is
# open to all.
BELOW = {
    "kernels": set(),
    "v1": set(),
    "clients": {"v1"},
    "leaf": set(),
    # Tensors by name, and nothing of who made or uses them.
    "server.adapters.operators": {"kernels"},
    "server.adapters": {"leaf", "server.adapters.operators"},
    "server.adapters.checkpoint": NOUNS,
    "server.adapters.peft_format.config": NOUNS | {"server.adapters.checkpoint"},
    "server.adapters.peft_format.refusals": NOUNS
    | {"server.adapters.checkpoint", "server.adapters.peft_format.config"},
    "server.adapters.peft_format": NOUNS
    | {"server.adapters.checkpoint"}
    | {f"server.adapters.peft_format.{name}" for name in ("config", "refusals")},
    "server.adapters.peft_format.vocabulary": NOUNS
    | {"server.adapters.checkpoint", "server.adapters.peft_format"}
    | {f"server.adapters.peft_format.{name}" for name in ("config", "refusals")},
    "server.adapters.lowering": NOUNS | READING - {"server.adapters.methods"},
    "server.adapters.methods": NOUNS | READING,
    # A method knows no other room's methods, and not how it is found.
    **{room: NOUNS | READING - {"server.adapters.methods"} | {"kernels"} for room in METHOD_ROOMS},
    "server.adapters.state": NOUNS,
    # What the hub has; adapters and models alike come from there.
    "server.hub": NOUNS,
    "server.adapters.residency": NOUNS | READING | {"server.hub"},
    "server.adapters.registry": NOUNS | READING | KEEPING | {"server.hub"},
    # Twins above the registry.
    "server.adapters.fuse": NOUNS | READING | {"server.adapters.registry", "server.adapters.state"},
    "server.adapters.merge": NOUNS | {"server.adapters.registry"},
    "server.adapters.device": NOUNS | {"kernels"},
    "server.adapters.device.cpu": NOUNS | DEVICE - {"server.adapters.device.cpu"} | {"kernels"},
    "server.adapters.device.gpu": NOUNS | DEVICE - {"server.adapters.device.gpu"} | {"kernels"},
    "server.models.weights": NOUNS | {"kernels"},
    "server.models.decoding": NOUNS | DEVICE | {"server.models.weights", "kernels"},
    "server.models": NOUNS | DEVICE | MODELS - {"server.models"} | {"kernels"},
    # Of models, only what tests/models/test_families.py lets it import.
    "server.models.families": {"leaf", "server.models", "server.models.decoding"},
    "server.models.sources": {"leaf", "server.hub", "server.models.families"},
    "server.constraints": {"leaf"},
    "server.engine.speculation": set(),
    "server.engine.scheduling": NOUNS | {"server.engine.speculation", "server.constraints"},
    "server.engine.step": NOUNS
    | DEVICE
    | MODELS
    | {"server.engine.scheduling", "server.constraints", "kernels"},
    "server.engine.step.gpu": NOUNS
    | DEVICE
    | MODELS
    | {"server.engine.scheduling", "server.engine.step", "kernels"},
    "server.engine": NOUNS
    | {"server.engine.scheduling", "server.engine.speculation", "server.engine.step"}
    # Its thread follows constraints, and needs their stack.
    | {"server.constraints"},
    # The fleet's state machines; what ties them to a server is above the API.
    "server.cluster": NOUNS | {"server.adapters.state"},
    "server.cluster.machine": {"leaf"},
    "server.cluster.replica": NOUNS
    | {"server.cluster", "server.hub", "server.adapters.residency"}
    | {f"server.adapters.{name}" for name in ("registry", "state", "merge")},
    # Of the parts behind it, the types alone: see NEVER_LOADS and test_app.
    "server.api.access": {"leaf"},
    "server.api": NOUNS | BEHIND_API | {"server.api.access"},
    "server.api.admin": NOUNS | BEHIND_API | {"server.api"},
    "server.api.inference": NOUNS | BEHIND_API | {"server.api", "server.api.access"},
    "server.rpc": API | {"leaf", "v1"},
    # Before torch: see test_command.
    "server.command": NOUNS
    | {f"server.adapters.{name}" for name in ("checkpoint", "peft_format.refusals")}
    # Models and preloaded adapters are looked up, on the hub too, before anything is loaded, and
    # the file of tokens is read.
    | {"server.models.families", "server.models.sources", "server.hub", "server.api.access"}
    | {"kernels"},
    "server.http.exchange": {"server.api", "server.api.access", "leaf", "v1"},
    "server.http.console": {
        *("server.http.exchange", "server.api", "server.api.admin", "server.api.inference"),
        *("leaf", "v1"),
    },
    "server.http.tools": {"leaf"},
    "server.http.bodies": {
        *("server.http.tools", "server.api", "server.api.inference", "leaf", "v1"),
    },
    "server.http.bodies.responses": {
        *("server.http.bodies", "server.http.tools", "server.api", "leaf", "v1"),
    },
    "server.http": {
        *("server.http.bodies", "server.http.bodies.responses"),
        *("server.http.console", "server.http.exchange"),
        *("server.http.tools", *API, "leaf", "v1"),
    },
}
MAY_IMPORT = {layer: {layer, *below} for layer, below in BELOW.items()}
MAY_IMPORT["server"] = {"server", *BELOW}
# A composition root beside ``server/app.py``; the command reads its plan, which knows no Ray.
MAY_IMPORT["server.cluster.serving"] = {"server.cluster.serving", "server", *BELOW}
MAY_IMPORT["command"] = {"server", "server.command", "clients", "training", "leaf"}
MAY_IMPORT["server.command"].add("server.cluster.machine")
# What takes signals before anything else is loaded.
MAY_IMPORT["entry"] = {"command", "server.command"}
for layer in ("server", "command", "server.command"):
    MAY_IMPORT[layer].add("server.cluster.serving")
MAY_IMPORT["training"] = {"training", "server", *BELOW} - {
    layer for layer in BELOW if layer.split(".")[1:2] in (["rpc"], ["http"], ["api"], ["engine"])
}
# Third-party modules that a layer may not load, whoever asks.
NEVER_LOADS = {
    "clients": ("torch", "transformers", "bitsandbytes"),
    "v1": ("torch",),
    "leaf": ("grpc", "transformers", "bitsandbytes"),
    "server.rpc": ("torch", "transformers", "bitsandbytes"),
    "server.http": ("grpc", "torch", "transformers", "bitsandbytes"),
    "server.command": ("grpc", "torch", "transformers", "bitsandbytes"),
    "server.api": ("grpc", "starlette", "uvicorn", "torch", "transformers", "bitsandbytes"),
    "server.engine": ("grpc", "transformers", "bitsandbytes"),
    "server.cluster": ("transformers", "bitsandbytes"),
    "server.adapters": ("grpc", "transformers", "peft"),
    "server.models": ("grpc", "peft"),
}
# What a kernel may import beside turret.kernels and the standard library.
KERNELS_LOAD = ("torch", "triton")


def layer_of(module: str) -> str:
    """The layer of a module named below ``turret``, such as ``server.engine.step``."""
    parts = module.split(".")
    if ".".join(parts[:3]) == ENTRY:
        return "entry"
    if parts[0] != "server":
        return parts[0]
    if ".".join(parts[:2]) == BASICS:
        return "leaf"
    for depth in (4, 3, 2):
        if len(parts) >= depth and ROOT.joinpath(*parts[:depth]).is_dir():
            return ".".join(parts[:depth])
    name = ".".join(parts[:2])
    return "command" if name == COMMAND else "leaf" if name in LEAVES else "server"


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module named below ``turret``."""
    layer, found = layer_of(module), []
    for line, name in imports_of(source):
        top = name.split(".")[0]
        if top == "turret":
            target = name.removeprefix("turret.")
            known = {package.split(".")[0] for package in PACKAGES.values()}
            # Not a package: an attribute of turret/__init__.py.
            if target.split(".")[0] in known and layer_of(target) not in MAY_IMPORT[layer]:
                found.append(f"{module}:{line} ({layer}) imports {name} ({layer_of(target)})")
        elif top in NEVER_LOADS.get(".".join(layer.split(".")[:2]), ()):
            found.append(f"{module}:{line} ({layer}) imports {name}")
        elif layer == "kernels" and not (top in KERNELS_LOAD or is_standard(top)):
            found.append(f"{module}:{line} (kernels) imports {name}")
        elif top in {*(folder.split("/")[0] for folder in PACKAGES), "bench", "tests", "examples"}:
            found.append(f"{module}:{line} imports the root folder {name}")
    return found


def is_standard(name: str) -> bool:
    return name in sys.stdlib_module_names


def python_files(*folders: str) -> list[Path]:
    """Python files of these root folders, generated code and installed packages left out."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.name and "node_modules" not in path.parts
    ]


def modules() -> Iterator[tuple[str, str]]:
    """Name below ``turret`` and source of every module of the package."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *parts)), path.read_text(encoding="utf-8")


def test_no_module_imports_upward():
    names = []
    found: list[str] = []
    for module, source in modules():
        names.append(module)
        found += complaints(module, source)
    assert {layer_of(name) for name in names} >= MAY_IMPORT.keys()
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.shrink", "import turret.server.errors"),
        ("kernels.shrink", "import bitsandbytes"),
        ("server.adapters.device.reference", "from turret.server.models import decoder"),
        (
            "server.adapters.device.reference",
            "def f():\n    from turret.server.engine.step.batch import Batch",
        ),
        (
            "server.adapters.registry.registry",
            "from turret.server.adapters.fuse.fuser import Fuser",
        ),
        ("server.models.decoding.decoder", "from turret.server.engine.step.batch import Batch"),
        ("server.engine.engine", "from turret.server import rpc"),
        ("server.engine.engine", "from turret.v1 import inference_pb2"),
        ("server.engine.engine", "import grpc.aio"),
        ("server.rpc.server", "from turret.server.app import App"),
        ("server.rpc.server", "import torch.nn"),
        ("server.http.chat", "import grpc"),
        ("server.http.chat", "from turret.server.rpc.status import to_rich_status"),
        ("server.http.chat", "from turret.server.engine.scheduling.request import Request"),
        ("server.api.inference.inference", "from starlette.requests import Request"),
        ("server.api.inference.inference", "import grpc"),
        ("server.api.inference.inference", "from turret.server.rpc.status import row_of"),
        ("server.errors", "import turret.server.engine.scheduling.request"),
        ("server.errors", "from turret.server.cli import main"),
        ("clients.client", "from turret.server.errors import TurretError"),
        ("clients.client", "import torch"),
        ("server.app", "from turret.training import trainer"),
        ("server.app", "from turret.server.cli import main"),
        ("training.trainer", "from turret.server.cli import main"),
        ("server.app", "from kernels.adapters.segments import SegmentPlan"),
        ("server.app", "import bench.machine"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str):
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "kernels.shrink",
            "import math\nimport torch\nfrom turret.kernels.adapters.segments import A",
        ),
        (
            "server.engine.step.runner",
            "import torch\nfrom turret.server.models.decoding.decoder import Decoder",
        ),
        ("server.rpc.server", "from turret.server.errors import TurretError"),
        ("clients.client", "import grpc\nfrom turret.v1 import inference_pb2"),
        ("server.cli", "from turret import __version__\nimport turret.clients.verbs"),
        ("server.cli", "from turret.training.verbs import add_parser"),
        ("training.trainer", "import peft\nfrom turret.server.models.loader import load_decoder"),
    ],
)
def test_a_downward_import_passes(module: str, source: str):
    assert complaints(module, source) == []


def test_root_folders_are_no_packages():
    """A ``kernels/__init__.py`` would shadow Hugging Face's package of that name."""
    for folder in ("server", "kernels", "clients", "proto", "training", "bench", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_folders_below_them_are_packages():
    """Without an ``__init__.py`` a folder would be missing from the wheel."""
    for folder in ("server", "kernels", "clients", "training"):
        for path in python_files(folder):
            if path.parent != ROOT / folder:
                assert (path.parent / "__init__.py").exists(), path.parent


def test_files_are_short():
    paths = python_files(*CODE)
    assert len(paths) > 50
    lines = {str(p.relative_to(ROOT)): p.read_text("utf-8").count("\n") for p in paths}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short():
    long = []
    for path in python_files(*CODE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                count = node.end_lineno - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {count}")
    assert long == []


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    found = [p for p in python_files(*CODE) if p.stem in drawers]
    assert found == []
