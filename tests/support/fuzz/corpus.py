"""The committed inputs: valid ones of each kind, and those that once caused a failure.

cd tests/support && python -m fuzz.corpus     writes the valid ones
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders.registries import Registries
from checkout import ROOT
from fuzz.doors import METHODS, PATHS
from fuzz.recipes import recipe
from google.protobuf.message import Message

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.v1 import adapters_pb2, inference_pb2

CORPUS = ROOT / "tests" / "fuzz" / "corpus"


def seeds() -> Iterator[tuple[str, bytes]]:
    """Every committed input with the name of its target: ``corpus/<target>/<anything>``."""
    for path in sorted(CORPUS.glob("*/*")):
        yield path.parent.name, path.read_bytes()


def _messages() -> dict[str, list[Message]]:
    generate = inference_pb2.GenerateRequest(prompt="a b", request_id="r")
    generate.adapters.add(name="a", weight=0.5)
    generate.sampling.temperature, generate.sampling.seed = 0.5, 3
    generate.sampling.logit_bias[5] = 1.5
    generate.stop.max_tokens = 3
    generate.stop.stop_strings.append("x")
    generate.options.logprobs, generate.options.top_n = True, 2
    chat = inference_pb2.ScoreRequest(top_n=1)
    chat.chat.messages.add(role="user", content="a")
    ids = inference_pb2.TokenizeRequest()
    ids.token_ids.ids.extend([1, 2, 3])
    embed = inference_pb2.EmbedRequest(pooling=inference_pb2.EmbedRequest.MEAN, dimensions=3)
    embed.inputs.add(prompt="a")
    embed.inputs.add().token_ids.ids.append(1)
    classify = inference_pb2.ClassifyRequest()
    classify.inputs.add(prompt="a")
    classify.adapters.add(name="a")
    fuse = adapters_pb2.FuseAdaptersRequest(name="f", combination="exact")
    fuse.adapters.add(name="a")
    fuse.adapters.add(name="b", weight=-1)
    merge = adapters_pb2.MergeAdaptersRequest(precision=adapters_pb2.MergeAdaptersRequest.NF4)
    merge.adapters.add(name="a")
    header = adapters_pb2.UploadAdapterRequest()
    header.header.name = "up"
    for name in (CONFIG_FILE, TENSORS_FILE):
        header.header.files.add(path=name, size_bytes=2)
    chunk = adapters_pb2.UploadAdapterRequest()
    chunk.chunk.path, chunk.chunk.data = CONFIG_FILE, b"{}"
    unload = adapters_pb2.UnloadAdapterRequest(
        name="a", mode=adapters_pb2.UnloadAdapterRequest.FORCE
    )
    unload.timeout.seconds = 1
    return {
        "Generate": [generate],
        "Score": [chat],
        "Embed": [embed],
        "Classify": [classify],
        "Tokenize": [ids],
        "LoadAdapter": [adapters_pb2.LoadAdapterRequest(name="c", path="c", pinned=True)],
        "UploadAdapter": [header, chunk],
        "FuseAdapters": [fuse],
        "MergeAdapters": [merge],
        "UnloadAdapter": [unload],
        "ListAdapters": [adapters_pb2.ListAdaptersRequest(page_size=1, method="lora")],
        "ExportAdapter": [adapters_pb2.ExportAdapterRequest(name="a", generation=1)],
    }


def _bodies() -> dict[str, Any]:
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tools = {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    repeated = {"user": "u", "metadata": {"k": "v"}, "text": {"format": {"type": "text"}}}
    return {
        "/v1/chat/completions": {"model": "base+a*-0.5", "messages": turns, "stream": True},
        "/v1/completions": {"model": "base", "prompt": [[1], [2]], "logit_bias": {"5": 1}, "n": 2},
        "/v1/embeddings": {"model": "a", "input": ["a", "b"], "encoding_format": "base64"},
        "/classify": {"model": "a", "input": ["a", [1, 2]]},
        "/tokenize": {"prompt": "a", "return_token_strs": True},
        "/detokenize": {"tokens": [1, 2]},
        "/v1/load_lora_adapter": {"lora_name": "c", "lora_path": "c"},
        "/v1/unload_lora_adapter": {"lora_name": "c"},
        "/v1/responses": {"model": "a", "input": turns, "max_output_tokens": 1} | repeated,
        "/v1/messages": {"model": "a", "messages": turns, "max_tokens": 1, "system": "s"} | tools,
        "/v1/messages/count_tokens": {"model": "a", "messages": turns} | tools,
        "/v1/pin_lora_adapter": {"lora_name": "a"},
    }


def _recipes() -> dict[str, tuple[str, bytes]]:
    """Recipes of large bodies by name, each with its path."""
    start, end = (b'{"model":"base",', 0), ((b"]", 0), (b"}", 0))
    chat, completions = "/v1/chat/completions", "/v1/completions"
    tool = b'{"type":"function","function":{"name":"f"}},'

    def listed(name: bytes, entry: bytes, power: int) -> bytes:
        opened = (start, (name, 0), (b"[", 0), (entry, power))
        return recipe(*opened, (b"null", 0), *end)

    return {
        "quotes": (completions, recipe(start, (b'"x":', 0), (b'"', 0), (b'\\"', 21))),
        "text": (completions, recipe(start, (b'"prompt":', 0), (b'"', 0), (b"a", 21), (b'"', 0))),
        "messages": (chat, listed(b'"messages":', b"{},", 20)),
        "tools": (chat, listed(b'"tools":', tool, 15)),
        "lists": (completions, listed(b'"x":', b"[[]],", 19)),
        "numbers": ("/v1/embeddings", listed(b'"input":', b"1e-400,", 19)),
        "deep": (completions, recipe(start, (b'"x":', 0), (b"[", 21), (b"]", 21))),
        "members": (completions, recipe((b"{", 0), (b'"x":', 0), (b'"', 0), (b"+m", 20))),
    }


def encoded(messages: list[Message], method: str) -> bytes:
    """The messages of a call in the form of the target ``message``."""
    number = next(i for i, each in enumerate(METHODS) if each.name == method)
    parts = [each.SerializeToString() for each in messages]
    # A message whose length does not fit into two bytes is truncated.
    cut = [part[: (1 << 16) - 1] for part in parts]
    return bytes([number]) + b"".join(len(p).to_bytes(2, "little") + p for p in cut)


def _saved(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a state directory."""
    from turret.server.adapters.state_dir import StateDir

    registries = Registries(folder)
    registry: AdapterRegistry = registries(load="a", state=StateDir(folder / "state", 1 << 20))
    yield "registration/saved", (folder / "state" / "adapters" / "a.json").read_bytes()
    del registry
    config = json.loads((folder / "root" / "a" / CONFIG_FILE).read_text())
    tensors = (folder / "root" / "a" / TENSORS_FILE).read_bytes()
    short = {key: value for key, value in config.items() if value is not None}
    text = json.dumps(short).encode()
    yield "config/lora", text
    yield "header/lora", tensors[: 8 + int.from_bytes(tensors[:8], "little")]
    yield "folder/lora", len(text).to_bytes(2, "little") + text + tensors
    registries.close()


def right() -> Iterator[tuple[str, bytes]]:
    """Path below the corpus → input, with at least one of every kind."""
    for method, messages in _messages().items():
        yield f"message/{method}", encoded(messages, method)
    for path, body in _bodies().items():
        number = PATHS.index(path)
        yield f"http/{path.rpartition('/')[2]}", bytes([number]) + json.dumps(body).encode()
    for name, (path, made) in _recipes().items():
        yield f"bodies/{name}", bytes([PATHS.index(path)]) + made
    yield "tokens/two", b"# who\nabc inference\ndef admin,metrics\n"
    with tempfile.TemporaryDirectory() as name:
        yield from _saved(Path(name))


def main() -> None:
    for name, data in right():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
