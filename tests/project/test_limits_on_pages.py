"""The limits that pages promise are those of the code.

Most tests of a limit make it smaller, so they pass whatever its real value is.
"""

from __future__ import annotations

from typing import Any

import pytest
from checkout import ROOT

from turret.server import metrics_server, remote, rpc
from turret.server.adapters.peft_format import targets
from turret.server.api import access, admin, call, uploads, violations, vocabularies
from turret.server.constraints import compiler, matcher
from turret.server.engine import answer
from turret.server.http import completions, connection, endpoint, fields, request_models, server
from turret.server.models import chat_template, encoder, own_tokenizers
from turret.v1 import adapters_pb2

KIB, MIB = 1 << 10, 1 << 20
OPTIONS: dict[str, Any] = dict(rpc._OPTIONS)


def seconds_of_upload(num_bytes: int) -> float:
    file = adapters_pb2.FileInfo(size_bytes=num_bytes)
    return uploads.most_seconds(adapters_pb2.UploadHeader(files=[file]))


SECURITY = [
    # Roles
    f"tries the file again every {access.POLL_SECONDS:.0f} seconds",
    # Memory of calls
    f"A gRPC message is at most {OPTIONS['grpc.max_receive_message_length'] // MIB} MiB long",
    f"An answer that nobody reads holds at most {answer.MAX_UNREAD_BYTES // MIB} MiB",
    f"of which more than {answer._LEAST_UNREAD_BYTES // KIB} KiB are unread",
    f"The first {call.UNCOUNTED_BYTES // KIB} KiB of each message do not count",
    f"receives at most {rpc.MOST_ARRIVING} gRPC messages at the same time, or"
    f" {rpc.MOST_ARRIVING_OPEN} if it needs no bearer token",
    f"one request has at most {completions.MAX_ANSWERS} answers",
    # Adapters and files
    f"run in a child process with {targets.CPU_SECONDS} s of processor time and"
    f" {targets.MAX_CHILD_BYTES // MIB} MiB of memory (`tests/adapters/reading/test_targets.py`)",
    f"child process with {remote._MAX_PROCESS_BYTES // (1 << 30)} GiB of address space",
    # Templates, tokenizers and constraints
    f"may take {chat_template.CPU_SECONDS:.0f} s of processor time,"
    f" {chat_template.MAX_BYTES // MIB} MiB of memory and"
    f" {chat_template.MAX_TEXT_BYTES // MIB} MiB of text",
    f"at most {own_tokenizers.MAX_TEXTS} texts of up to"
    f" {own_tokenizers.MAX_TOKEN_CHARS} characters",
    f"child process with {own_tokenizers.CPU_SECONDS:.0f} s of processor time and"
    f" {own_tokenizers.MAX_BYTES // (1 << 30)} GiB of memory reads `tokenizer.json`",
    f"child process with {encoder.CPU_SECONDS:.0f} s of processor time (`tests/models/test_encoder",
    f"more than {matcher._FIRST_SECONDS:.0f} s of processor time plus"
    f" {1000 * matcher._TOKEN_SECONDS:.0f} ms per token",
    f"child process with {compiler._TRIAL_SECONDS:.0f} s of processor time and"
    f" {(compiler._TRIAL_BYTES - matcher.STACK_BYTES) // MIB} MiB of memory first compiles every"
    f" constraint of more than {compiler._SHORT_CHARS} characters",
    f"All constraints in use take at most {matcher.MAX_HELD_BYTES // MIB} MiB",
    f"At most {matcher.MAX_CACHED_BYTES // MIB} MiB of constraints are kept",
    # Messages
    f"An error lists at most {violations.MAX_VIOLATIONS} violations",
    # Connections
    f"accepts {access.MOST_CONNECTIONS:,} connections at once",
    f"if fewer than {access.RESERVED_DESCRIPTORS} file descriptors would stay free",
    f"A TLS handshake must end within {connection.HANDSHAKE_SECONDS:.0f} s",
    f"handshake must end within {OPTIONS['grpc.server_handshake_timeout_ms'] / 1000:.0f} s",
    f"message of a call must arrive within {rpc.MESSAGE_SECONDS:.0f} s",
    f"Metadata is at most {OPTIONS['grpc.absolute_max_metadata_size'] // KIB} KiB long",
    f"without calls is closed after {OPTIONS['grpc.max_connection_idle_ms'] / 60_000:g} minutes",
    f"At most {rpc.MOST_CALLS:,} gRPC calls may be open at once,"
    f" {rpc.MOST_CALLS_PER_TOKEN:,} of them with the same bearer token",
    f"at most {rpc.MOST_OPEN_CALLS:,} health and reflection calls",
    f"One connection may have {OPTIONS['grpc.max_concurrent_streams']:,} gRPC calls open",
    f"At most {admin.MAX_UPLOADS} uploads, {access.MAX_EXPORTS} exports over gRPC,"
    f" {access.MAX_EXPORTS} downloads of checkpoints and {admin._DRAINS} unloads",
    f"run on {admin._SLOW_CALLS} threads, and those that download from a hub, a bucket or a"
    f" registry on {admin._DOWNLOADS} others",
    f"accepts {metrics_server.MAX_CONNECTIONS} connections, each for"
    f" {metrics_server.TIMEOUT_SECONDS:.0f} s",
    f"chunked body is at most {connection.MAX_FRAMING_BYTES // MIB} MiB long",
]
OPENAI = [
    f"at most {connection.MAX_BODY_BYTES // MIB} MiB long and 200 levels deep, and arrive within"
    f" {endpoint.BODY_SECONDS:.0f} s",
    f"The head may be {connection.MAX_HEAD_BYTES // KIB} KiB long and have"
    f" {connection.MAX_HEADERS} headers, and must arrive within {connection.HEAD_SECONDS:.0f} s",
    f"may send {connection.MAX_SENT_AHEAD} requests ahead",
    f"An idle connection is closed after {server.KEEP_ALIVE_SECONDS} s",
    f"`n` is at most {request_models.MAX_ANSWERS}, a list of prompts at most {fields.MAX_PROMPTS}"
    f" long, and all prompts together may have {completions.MAX_ANSWERS} answers",
    f"`metadata` has at most {request_models.MAX_METADATA} entries, and a body may hold"
    f" {endpoint.MAX_CONTAINERS} lists and objects",
]


@pytest.mark.parametrize(
    ("page", "phrase"),
    [
        *(("security", phrase) for phrase in SECURITY),
        *(("openai", phrase) for phrase in OPENAI),
    ],
)
def test_the_page_has_the_limit_of_the_code(page: str, phrase: str) -> None:
    assert phrase in " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split())


def test_times_of_transfers_are_those_of_the_page() -> None:
    page = " ".join((ROOT / "docs" / "security.md").read_text(encoding="utf-8").split())
    assert "An upload may take two minutes plus one second per 128 KiB, and may pause for" in page
    assert (seconds_of_upload(0), seconds_of_upload(10 * 128 * KIB)) == (120.0, 130.0)
    assert uploads.IDLE_SECONDS == 60.0
    assert "for at most a minute plus one second per MiB" in page
    assert (remote.LEAST_SECONDS, remote.LEAST_BYTES_PER_SECOND) == (60.0, MIB)


def test_numbers_in_words_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert "At most two tokenizers or templates are read at a time" in page
    assert vocabularies._READERS == 2
