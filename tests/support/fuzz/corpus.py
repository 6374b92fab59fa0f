"""The committed inputs: valid ones of each kind, and those that once caused a failure.

cd tests/support && python -m fuzz.corpus     writes the valid ones
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from builders.registries import Registries
from checkout import ROOT
from fuzz.protocols import METHODS, MODEL, PATHS, SESSION, TRAINING_PATHS
from fuzz.recipes import recipe
from google.protobuf.message import Message

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.v1 import adapters_pb2, inference_pb2, tinker_pb2, training_pb2

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
    config = training_pb2.TrainingConfig(method="lora", rank=2, seed=1, targets=["q_proj"])
    a_pass = training_pb2.ForwardBackwardRequest(loss="ppo", loss_config={"clip_low_threshold": 1})
    a_pass.data.add(token_ids=[1, 2], target_ids=[2, 1], logprobs=[-1, -1], advantages=[1, 0])
    step = training_pb2.OptimStepRequest(learning_rate=0.1, beta1=0.9, grad_clip_norm=1)
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
        "CreateModel": [training_pb2.CreateModelRequest(config=config)],
        "ForwardBackward": [a_pass],
        "OptimStep": [step],
        "SaveCheckpoint": [training_pb2.SaveCheckpointRequest(name="a", overwrite=True)],
        "LoadCheckpoint": [training_pb2.LoadCheckpointRequest(optimizer=True)],
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


def _sessions() -> dict[str, list[tuple[str, Any]]]:
    """Calls for training, by the kind of session: paths, each with a message or a JSON object."""
    model, session = {"model_id": MODEL.decode()}, {"session_id": SESSION.decode()}
    path = f"tinker://{MODEL.decode()}/weights/a"
    a_pass = tinker_pb2.TinkerPass(loss_fn="cross_entropy")
    datum = a_pass.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
    for name, values in (
        ("target_tokens", np.array([2, 1], "<i8")),
        ("weights", np.ones(2, "<f4")),
    ):
        tensor = datum.loss_fn_inputs[name]
        tensor.dense = values.tobytes()
        tensor.shape.append(2)
        kind = tinker_pb2.TinkerTensor
        tensor.dtype = kind.INT64 if values.dtype == np.int64 else kind.FLOAT32
    adam = {"learning_rate": 0.1, "grad_clip_norm": 1.0}
    saved = {"path": "a", "ttl_seconds": 60, "user_metadata": {"k": "v"}}
    sampler = f"{SESSION.decode()}:sample:0"
    chosen = {"sampling_session_seq_id": 0}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    params = {"max_tokens": 1, "stop": ["a"], "seed": 1}
    second = {**session, "model_seq_id": 1, "base_model": "base", "lora_config": {"rank": 2}}
    return {
        "train": [
            ("forward_backward", a_pass),
            ("optim_step", {**model, "seq_id": 2, "adam_params": adam}),
            ("save_weights", {**model, "seq_id": 3, **saved}),
            ("weights_info", {"tinker_path": path}),
            ("load_weights", {**model, "seq_id": 4, "path": path, "optimizer": True}),
            ("get_info", model),
            ("unload_model", model),
        ],
        "sample": [
            ("save_weights_for_sampler", {**model, "seq_id": 1, **chosen}),
            ("create_sampling_session", {**session, **chosen, "base_model": "base"}),
            (
                "asample",
                {
                    "sampling_session_id": sampler,
                    "seq_id": 0,
                    "prompt": prompt,
                    "sampling_params": params,
                    "num_samples": 2,
                },
            ),
            ("save_weights_external", {**model, "seq_id": 2, "path": "b"}),
        ],
        "sessions": [
            ("create_session", {"tags": []}),
            ("create_model", second),
            ("session_heartbeat", session),
            ("telemetry", {"events": [{"a": 1}]}),
            ("cancel_future", {"request_id": f"{SESSION.decode()}:0"}),
            ("retrieve_future", {"request_id": f"{MODEL.decode()}:0"}),
        ],
    }


def _session(calls: list[tuple[str, Any]]) -> bytes:
    """The calls of a session in the form of the target ``training``."""
    made = b""
    for name, sent in calls:
        is_message = isinstance(sent, Message)
        body = sent.SerializeToString() if is_message else json.dumps(sent).encode()
        number = TRAINING_PATHS.index(f"/api/v1/{name}")
        made += bytes([number]) + len(body).to_bytes(2, "little") + body
    return made


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
    for name, calls in _sessions().items():
        yield f"training/{name}", _session(calls)
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
