"""Bodies that are no JSON, and what is said of them."""

from __future__ import annotations

import gzip
import json

import pytest
from servers.http_harness import Refused, http_harness

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}
TEXT = json.dumps({"model": "base", "prompt": "\u00e9"}, ensure_ascii=False)
# Of one time: what a test is called holds it.
ZIPPED = gzip.compress(TEXT.encode(), mtime=0)
UTF16 = "the body is not UTF-8, as JSON must be: it may be UTF-16"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty: it must be a JSON object"),
        (TEXT.encode("utf-16"), UTF16),
        (TEXT.encode("utf-16-le"), UTF16),
        (TEXT.encode("utf-32"), UTF16),
        (TEXT.encode("latin-1"), "the body is not UTF-8, as JSON must be: see byte 29"),
        (ZIPPED, "the body is compressed: send the JSON as it is"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "a number in the body has more than 4300 digits"),
        (b'{"seed": NaN}', "the body is no JSON: NaN is no JSON number"),
        (b"[1]", "the body must be a JSON object"),
    ],
)
async def test_what_is_no_json_is_told_in_its_sender_s_words(body: bytes, said: str) -> None:
    async with http_harness() as server:
        refused = Refused.of(await server.client.post(PATH, content=body, headers=JSON))
        assert (refused.status, refused.message) == (400, said)


async def test_where_json_ends_too_early_is_told() -> None:
    async with http_harness() as server:
        answer = await server.client.post(PATH, content=TEXT[:-1].encode(), headers=JSON)
        assert Refused.of(answer).message.startswith("the body is no JSON: Expecting")


async def test_a_body_that_is_declared_to_be_compressed_is_not_read() -> None:
    async with http_harness() as server:
        headers = JSON | {"content-encoding": "gzip"}
        answer = await server.client.post(PATH, content=TEXT.encode(), headers=headers)
        refused = Refused.of(answer)
        assert (refused.status, refused.code) == (415, "unsupported_media_type")
        assert "compressed" in refused.message
        same = JSON | {"content-encoding": "identity"}
        answer = await server.client.post(PATH, content=TEXT.encode(), headers=same)
        assert answer.status_code == 200


async def test_a_mark_of_utf_8_is_no_part_of_the_json() -> None:
    async with http_harness() as server:
        answer = await server.client.post(PATH, content=TEXT.encode("utf-8-sig"), headers=JSON)
        assert answer.status_code == 200
