"""Requests of the Tinker API, without its client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

from turret.v1 import tinker_pb2

Pass = tinker_pb2.TinkerPass
TOKENS = [1, 2, 3]
API = "/api/v1"
PROTOBUF = {"content-type": "application/x-protobuf"}
LORA = {"rank": 4, "seed": 1}


def tensor(values: Sequence[float], kind: str = "f4", **changes: Any) -> tinker_pb2.TinkerTensor:
    dtype = tinker_pb2.TinkerTensor.INT64 if kind == "i8" else tinker_pb2.TinkerTensor.FLOAT32
    data = np.array(values, f"<{kind}").tobytes()
    fields = {"dense": data, "dtype": dtype, "shape": [len(values)], **changes}
    return tinker_pb2.TinkerTensor(**fields)


def pass_of(
    model_id: str, number: int, tokens: Sequence[int] = TOKENS, **changes: Any
) -> tinker_pb2.TinkerPass:
    """A pass over one sequence, whose tokens predict the following ones."""
    message = Pass(model_id=model_id, seq_id=number, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
    targets = tensor([*tokens[1:], tokens[0]], "i8")
    datum.loss_fn_inputs["target_tokens"].CopyFrom(targets)
    datum.loss_fn_inputs["weights"].CopyFrom(tensor([1.0] * len(tokens)))
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@dataclass
class Tenant:
    """A client of the API, with a session."""

    client: httpx2.AsyncClient
    headers: Mapping[str, str]
    session: str = ""

    async def send(self, path: str, body: Any = None, *, verb: str = "POST") -> httpx2.Response:
        fields: dict[str, Any] = {"headers": dict(self.headers)}
        if isinstance(body, bytes):
            fields |= {"content": body, "headers": {**self.headers, **PROTOBUF}}
        elif body is not None:
            fields |= {"json": body}
        return await self.client.request(verb, f"{API}{path}", **fields)

    async def ask(self, path: str, body: Any = None, *, verb: str = "POST") -> dict[str, Any]:
        answer = await self.send(path, body, verb=verb)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def result(self, promise: Mapping[str, Any]) -> Any:
        """The result of a promise: an object, or the bytes of a message."""
        answer = await self.send("/retrieve_future", {"request_id": promise["request_id"]})
        assert answer.status_code == 200, answer.text
        is_json = answer.headers["content-type"] == "application/json"
        return answer.json() if is_json else answer.content

    async def done(self, path: str, body: Any) -> Any:
        """The result of a call that returns a promise."""
        return await self.result(await self.ask(path, body))

    async def save(self, model_id: str, number: int, name: Any, end: str = "", **more: Any) -> Any:
        """The result of saving a checkpoint; ``end`` is the end of the endpoint's path."""
        body = {"model_id": model_id, "seq_id": number, "path": name, **more}
        return await self.done(f"/save_weights{end}", body)

    async def sampler(self, number: int = 0, **source: str) -> str:
        """The id of a new sampler of the base, or of another source."""
        body = {"session_id": self.session, "sampling_session_seq_id": number}
        asked = {**body, **(source or {"base_model": "base"})}
        return (await self.ask("/create_sampling_session", asked))["sampling_session_id"]

    async def begin(self) -> None:
        self.session = (await self.ask("/create_session", {"tags": []}))["session_id"]

    async def model(self, number: int = 0, **changes: Any) -> str:
        body = {"session_id": self.session, "model_seq_id": number, "base_model": "base"}
        made = await self.done("/create_model", {**body, "lora_config": LORA, **changes})
        return made["model_id"]

    async def run(self, message: tinker_pb2.TinkerPass) -> Any:
        return await self.done("/forward_backward", message.SerializeToString())


def sample_of(sampler_id: str, tokens: Sequence[int] = TOKENS, **changes: Any) -> dict[str, Any]:
    """The body of a request for samples."""
    prompt = {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}
    body = {"sampling_session_id": sampler_id, "seq_id": 0, "prompt": prompt, "num_samples": 1}
    return {**body, "sampling_params": {"max_tokens": 2}, "type": "sample", **changes}
