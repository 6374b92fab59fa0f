"""Bodies that are not JSON."""

from __future__ import annotations

import gzip
import json

import pytest
from servers.http_harness import Refused, http_harness

from turret.server.http.endpoint import parse

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}
TEXT = json.dumps({"model": "base", "prompt": "\u00e9"}, ensure_ascii=False)
# Compress with a fixed time, because the bytes are part of a test's name.
ZIPPED = gzip.compress(TEXT.encode(), mtime=0)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "body_not_json"),
        (TEXT[:-1].encode(), "body_not_json"),
        (TEXT.encode("utf-16"), "body_not_json"),
        (TEXT.encode("utf-32"), "body_not_json"),
        (TEXT.encode("latin-1"), "body_not_json"),
        (ZIPPED, "body_not_json"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "body_not_json"),
        (b'{"seed": NaN}', "body_not_json"),
        (b'{"a": [1,]}', "body_not_json"),
        (b'{"a": "\x00"}', "body_not_json"),
        (b'{"a": 1} x', "body_not_json"),
        # JSON can contain half of a surrogate pair, which is not a character.
        (rb'{"a": "\ud800"}', "body_not_json"),
        (rb'{"a": [{"\ude00\ud83d": 1}]}', "body_not_json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "body_not_json"),
        (b"[1]", "body_not_object"),
    ],
)
async def test_a_body_that_is_not_json_is_rejected(body: bytes, code: str) -> None:
    async with http_harness() as server:
        refused = Refused.of(await server.client.post(PATH, content=body, headers=JSON))
        assert (refused.status, refused.code, refused.param) == (400, code, None)


def test_the_last_of_duplicate_keys_counts() -> None:
    assert parse(b'{"a": 1, "a": 2, "b": "\\ud83d\\ude00"}') == {"a": 2, "b": "😀"}


async def test_a_body_that_is_declared_to_be_compressed_is_not_read() -> None:
    async with http_harness() as server:
        headers = JSON | {"content-encoding": "gzip"}
        answer = await server.client.post(PATH, content=TEXT.encode(), headers=headers)
        refused = Refused.of(answer)
        assert (refused.status, refused.code) == (415, "unsupported_media_type")
        same = JSON | {"content-encoding": "identity"}
        answer = await server.client.post(PATH, content=TEXT.encode(), headers=same)
        assert answer.status_code == 200


async def test_a_byte_order_mark_is_skipped() -> None:
    async with http_harness() as server:
        answer = await server.client.post(PATH, content=TEXT.encode("utf-8-sig"), headers=JSON)
        assert answer.status_code == 200
