"""Errors in the words of the caller: arguments, flags and causes, without repetitions."""

from __future__ import annotations

import argparse
import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from said import says
from servers.command import add_verbs
from servers.fake_turret import FakeTurret

from turret.clients import channel, errors
from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.fields import ArgumentValueError, argument
from turret.clients.results import Completion
from turret.clients.verbs.command import as_typed, print_error
from turret.clients.words import Text, say
from turret.v1 import inference_pb2

LONG = "a" * 5_000_000


def refusal(found: dict[str, str]) -> errors.TurretRpcError:
    """A server's error with these violations."""
    said = "; ".join(f"{field}: {why}" for field, why in found.items())
    bad = [{"field": field, "description": why} for field, why in found.items()]
    status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=said)
    for detail in (
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="turret"),
        error_details_pb2.BadRequest(field_violations=bad),
    ):
        status.details.add().Pack(detail)

    class Failure(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INVALID_ARGUMENT

        def details(self) -> str:
            return said

        def trailing_metadata(self) -> Any:
            return (("grpc-status-details-bin", status.SerializeToString()),)

    return errors.TurretRpcError.from_grpc(Failure())


REFUSED = {
    "stop.min_tokens": "must be <= stop.max_tokens",
    "stop.stop_strings": "at most 8 entries",
    "adapters[1].name": "'json' occurs twice",
    "timeout": "must be in [0, 3600] seconds",
    "inputs[0]": "the prompt has no tokens",
    "inputs[1].token_ids.ids[2]": "9 is not in [0, 9)",
    "inputs[2].chat": "this model has no chat template",
    "chat.messages[0].role": "is none",
    "choice.texts": "at least one",
    "header.name": "must be shorter",
    "token_ids.ids": "is empty",
}


def test_refusals_name_the_arguments_that_were_given():
    error = refusal(REFUSED)
    said = {
        "min_tokens": "must be <= stop.max_tokens",
        "stop": "at most 8 entries",
        "adapters[1].name": "'json' occurs twice",
        "drain_seconds": "must be in [0, 3600] seconds",
        "inputs[0]": "the prompt has no tokens",
        "inputs[1][2]": "9 is not in [0, 9)",
        "inputs[2].chat": "this model has no chat template",
        "messages[0].role": "is none",
        "choice": "at least one",
        "name": "must be shorter",
        "prompt": "is empty",
    }
    assert {v.field: v.description for v in error.violations} == said
    assert error.message.startswith("min_tokens: must be <= stop.max_tokens; stop: at most 8 entr")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (
            ("generate", "a"),
            {
                "min_tokens": "--min-tokens",
                "stop": "--stop",
                "stop_token_ids[1]": "--stop-token-id 2",
                "adapters[1].name": "--adapter 2",
                "prompt": "PROMPT",
                "messages[0].role": "messages[0].role",
            },
        ),
        (
            ("embed",),
            {"inputs[0]": "TEXT 1", "inputs[2].chat": "TEXT 3", "inputs[1][2]": "inputs[1][2]"},
        ),
        (("eval", "a"), {"adapters[1].name": "--mix 2"}),
        (("adapters", "unload", "a"), {"drain_seconds": "--wait", "name": "NAME"}),
        (
            ("adapters", "load", "a", "b"),
            {"pinned": "--pin", "path": "PATH", "ca": "--tls-ca", "key": "--tls-key"},
        ),
    ],
)
def test_errors_name_the_flag_that_was_typed(verb: tuple[str, ...], flags: dict[str, str]):
    args = parsed(*verb)
    assert {name: as_typed(name, args) for name in flags} == flags


def test_refusals_name_the_flags_that_were_typed(capsys: pytest.CaptureFixture[str]):
    print_error(refusal(REFUSED), parsed("generate", "a"))
    said = (
        "--min-tokens: must be <= stop.max_tokens; --stop: at most 8 entries; --adapter 2: 'json'"
        " occurs twice; drain_seconds: must be in [0, 3600] seconds; inputs[0]: the prompt has no"
        " tokens; inputs[1][2]: 9 is not in [0, 9); inputs[2].chat: this model has no chat"
        " template; messages[0].role: is none; and more"
    )
    assert capsys.readouterr().err == f"error: INVALID_ARGUMENT (INVALID_REQUEST): {said}\n"
    text = say("TOO_SMALL", least=0, value=-1)
    print_error(ArgumentValueError("top_n", text), parsed("generate", "a"))
    assert capsys.readouterr().err == f"error: --top-n: {text}\n"
    # Every field that a flag sets has the flag's name.
    parts = {"sampling": inference_pb2.SamplingParams, "stop": inference_pb2.StopConditions}
    fields = {f"{name}.{f.name}" for name, part in parts.items() for f in part.DESCRIPTOR.fields}
    names = map(argument, fields - {"sampling.logit_bias"})
    args = parsed("generate", "a")
    assert all(as_typed(name, args).startswith("--") for name in names)


def test_a_message_that_is_too_large_is_reported(client: TurretClient):
    for ask in (lambda: client.generate(LONG), lambda: list(client.generate_stream(LONG))):
        with pytest.raises(errors.InvalidArgumentError) as raised:
            ask()
        assert raised.value.reason == "REQUEST_TOO_LARGE"
        assert isinstance(raised.value.message, Text)
        assert raised.value.message.params["most"] == "4194304"
        assert raised.value.message.params["size"].startswith("50000")


def test_an_answer_that_is_too_large_is_reported(server: FakeTurret, monkeypatch):
    options = [(n, 64 if n.endswith("receive_message_length") else v) for n, v in channel._OPTIONS]
    monkeypatch.setattr(channel, "_OPTIONS", tuple(options))
    with (
        TurretClient(server.address) as client,
        pytest.raises(errors.InvalidArgumentError) as raised,
    ):
        client.generate("a" * 99)
    assert raised.value.reason == "ANSWER_TOO_LARGE"


def test_a_closed_client_rejects_calls(server: FakeTurret, tmp_path: Path):
    client = TurretClient(server.address)
    client.close()
    for call in (
        lambda: client.generate("a"),
        lambda: client.generate_stream("a"),
        lambda: client.adapters.get("a"),
        lambda: client.adapters.export("a", tmp_path / "a"),
    ):
        with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
            call()

    async def closed() -> None:
        client = AsyncTurretClient(server.address)
        await client.close()
        for call in (client.generate("a"), client.adapters.get("a")):
            with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
                await call
        with pytest.raises(RuntimeError, check=says("CLIENT_CLOSED")):
            client.generate_stream("a")

    asyncio.run(closed())


def test_an_address_without_a_turret_server_is_reported():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        with (
            TurretClient(address, max_retries=0) as client,
            pytest.raises(errors.UnavailableError) as raised,
        ):
            client.generate("a")
        assert raised.value.reason == "NOT_GRPC"
        other.shutdown()
    said = errors.cause_of(
        grpc.StatusCode.UNAVAILABLE, "errors resolving no.such:3: [field:hostname no]"
    )
    assert (said[1], "no.such:3" in said[2]) == ("NOT_REACHED", True)


def test_violations_are_not_appended_to_a_summary_of_faults():
    said = "adapter 'a' does not fit: it is for 32 layers; and 117 more"
    found = [errors.FieldViolation(f"layers.{i}", "the base has no such module") for i in range(30)]
    code = grpc.StatusCode.FAILED_PRECONDITION
    error = errors.TurretRpcError(code, said, reason="ADAPTER_BASE_MISMATCH", violations=found)
    assert str(error) == f"FAILED_PRECONDITION (ADAPTER_BASE_MISMATCH): {said}"
    assert len(error.violations) == 30


def test_errors_do_not_repeat_the_status():
    said = errors.TurretRpcError(grpc.StatusCode.UNAVAILABLE, "it starts", reason="UNAVAILABLE")
    assert str(said) == "UNAVAILABLE: it starts"
    with (
        TurretClient("127.0.0.1:1", max_retries=0) as nowhere,
        pytest.raises(errors.UnavailableError) as raised,
    ):
        nowhere.generate("a")
    text = say("NOT_REACHED", place="127.0.0.1:1", why="Connection refused")
    assert str(raised.value) == f"UNAVAILABLE (NOT_REACHED): {text}; {errors.HINTS['NOT_REACHED']}"


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
KINDS = [kind for kind in KINDS if issubclass(kind, errors.TurretRpcError)]


def pickled(protocol: int) -> Callable[[errors.TurretRpcError], errors.TurretRpcError]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, *map(pickled, (0, 2, 5))])
def test_an_error_survives_pickling(kind: type[errors.TurretRpcError], again):
    error = kind(
        grpc.StatusCode.NOT_FOUND,
        "no adapter a",
        reason="ADAPTER_NOT_FOUND",
        metadata={"adapters": "a"},
        violations=[errors.FieldViolation("adapters[0]", "is none")],
        retry_delay=0.5,
        request_id="r-7",
    )
    error.add_note("of line 3")
    made = again(error)
    assert type(made) is kind
    assert (str(made), made.args, vars(made)) == (str(error), error.args, vars(error))


def test_a_cut_answer_keeps_its_partial_text():
    answer = inference_pb2.GenerateResponse(text="Once", token_ids=[1, 2])
    error = errors.AnswerCutError.of(Completion.from_proto(answer))
    made = pickle.loads(pickle.dumps(error))
    assert made.completion == error.completion
    assert made.completion.text == "Once"
    assert made.is_lost
