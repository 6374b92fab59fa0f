"""The API's definition: lint, and matching generated code."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from turret.v1 import adapters_pb2, inference_pb2

PROTO = ROOT / "proto"
SOURCES = tuple(
    f"turret/v1/{name}.proto" for name in ("adapters", "inference", "tinker", "training")
)


def test_generated_code_is_up_to_date(tmp_path: Path):
    grpc_tools = pytest.importorskip("grpc_tools")
    version = importlib.metadata.version("grpcio-tools")
    # Other versions generate other bytes; pyproject.toml pins the required one.
    assert version == "1.75.1", f"generate with the pinned grpcio-tools, not {version}"
    outputs = (f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python"))
    subprocess.run(
        [sys.executable, "-m", f"{grpc_tools.__name__}.protoc", f"-I{PROTO}", *outputs, *SOURCES],
        cwd=PROTO,
        check=True,
    )
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*.py*")}
    committed = {
        p.relative_to(PROTO): p.read_bytes()
        for p in PROTO.rglob("*_pb2*.py*")
        if p.suffix in (".py", ".pyi")
    }
    assert len(fresh) == 3 * len(SOURCES)
    assert committed == fresh


def test_every_proto_file_is_generated():
    assert sorted(SOURCES) == sorted(str(p.relative_to(PROTO)) for p in PROTO.rglob("*.proto"))


def test_zero_is_distinguished_from_unset():
    """Scalars have presence if 0 is a valid value other than the default."""
    for message in (inference_pb2.SamplingParams, inference_pb2.StopConditions):
        for field in message.DESCRIPTOR.fields:
            assert field.is_repeated or field.has_presence, field.full_name
    assert inference_pb2.TokenLogprob.DESCRIPTOR.fields_by_name["logprob"].has_presence
    weight = adapters_pb2.AdapterWeight.DESCRIPTOR
    assert weight.fields_by_name["weight"].has_presence
    assert weight.fields_by_name["generation"].has_presence
