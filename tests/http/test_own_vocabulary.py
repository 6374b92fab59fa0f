"""Adapters with their own tokens over both protocols: tokenizer, template, stops, constraints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from builders.added_tokens import ADDED, END, FIRST, ROWS, TEMPLATE, grown_tokenizer, save_grown
from builders.methods import make_config
from method_oracle import oracle_greedy, oracle_logprobs, twin
from servers.both_protocols import Protocols, serving
from servers.rpc_harness import failure_of

from turret.clients.aio import AsyncTurretClient
from turret.v1 import adapters_pb2, inference_pb2

ASK = [{"role": "user", "content": "hi turret <|end|>"}]
WITH = [adapters_pb2.AdapterWeight(name="grown")]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The adapters' directory, and the adapter in PEFT."""
    folder = tmp_path_factory.mktemp("adapters")
    config = make_config(
        "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    return folder, save_grown(twin("llama").model, config, folder / "grown")


@pytest.fixture
def oracle(grown: tuple[Path, Any]) -> Any:
    return grown[1]


@pytest.fixture
async def protocols(grown: tuple[Path, Any], tmp_path: Path) -> AsyncIterator[Protocols]:
    model, state = twin("llama").folder, tmp_path / "state"
    async with serving(model, grown[0], "grown", state=state) as protocols:
        yield protocols


async def test_text_uses_the_adapters_vocabulary(protocols: Protocols) -> None:
    """Tests Tokenize, GetAdapter and the HTTP equivalents."""
    text = "a turret <|end|> b"
    expected = grown_tokenizer()(text)["input_ids"]
    assert FIRST in expected
    assert END in expected
    plain = await protocols.rpc.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=text))
    assert max(plain.token_ids) < FIRST
    own = await protocols.rpc.inference.Tokenize(
        inference_pb2.TokenizeRequest(prompt=text, adapters=WITH)
    )
    assert list(own.token_ids) == expected
    assert own.text == text
    assert own.token_texts[expected.index(FIRST)] == "turret"
    answer = await protocols.http.post("/tokenize", {"model": "grown", "prompt": text})
    assert answer.json()["tokens"] == expected
    back = await protocols.http.post("/detokenize", {"model": "grown", "tokens": expected})
    assert back.json() == {"prompt": text}
    refused = await protocols.http.refused("/detokenize", {"tokens": expected})
    assert (refused.status, refused.param) == (400, f"tokens[{expected.index(FIRST)}]")
    unknown = inference_pb2.TokenizeRequest(
        prompt=text, adapters=[adapters_pb2.AdapterWeight(name="other")]
    )
    assert (
        await failure_of(protocols.rpc.inference.Tokenize(unknown))
    ).reason == "ADAPTER_NOT_FOUND"
    question = adapters_pb2.GetAdapterRequest(name="grown")
    assert (await protocols.rpc.adapters.GetAdapter(question)).vocab_size == ROWS


async def test_a_chat_has_the_adapters_template(protocols: Protocols, oracle: Any) -> None:
    """Special tokens in messages are text; those of the template are tokens."""
    body = {"messages": ASK, "max_tokens": 6, "temperature": 0, "logprobs": True}
    refused = await protocols.http.refused("/v1/chat/completions", {"model": "base", **body})
    assert refused.code == "no_chat_template"
    answer = (await protocols.http.post("/v1/chat/completions", {"model": "grown", **body})).json()
    prompt = await protocols.tokens("grown", ASK)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert (prompt[0], prompt.count(END), prompt.count(FIRST)) == (FIRST + 1, 1, 1)
    expected, logprobs = oracle_greedy(oracle, prompt, 6)
    if END in expected:
        expected = expected[: expected.index(END) + 1]
    told = answer["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in told] == [
        grown_tokenizer().decode([token]) for token in expected
    ]
    for item, logprob in zip(told, logprobs, strict=False):
        assert abs(item["logprob"] - logprob) <= 1e-4 * max(1.0, abs(logprob))


async def test_scores_match_peft(protocols: Protocols, oracle: Any) -> None:
    text = "<|user|>turret abc turret<|end|>"
    request = inference_pb2.ScoreRequest(prompt=text, adapters=WITH, top_n=2)
    scored = await protocols.rpc.inference.Score(request)
    ids = grown_tokenizer()(text)["input_ids"]
    assert [token.token_id for token in scored.tokens] == ids
    rows = oracle_logprobs(oracle, ids)
    for index, token in enumerate(scored.tokens[1:]):
        expected = float(rows[index, ids[index + 1]])
        assert abs(token.logprob - expected) <= 1e-4 * max(1.0, abs(expected))
        assert token.top[0].token_id == int(rows[index].argmax())
    assert scored.tokens[1].text == "turret"


def _request(**fields: Any) -> inference_pb2.GenerateRequest:
    stop = inference_pb2.StopConditions(**{"max_tokens": 6, **fields.pop("stop", {})})
    sampling = inference_pb2.SamplingParams(temperature=0.0, **fields.pop("sampling", {}))
    options = inference_pb2.ResponseOptions(token_ids=True)
    given = {"adapters": WITH, "prompt": "x", "sampling": sampling, "stop": stop}
    return inference_pb2.GenerateRequest(**{**given, "options": options, **fields})


async def test_stops_and_biases_accept_added_tokens(protocols: Protocols) -> None:
    generate = protocols.rpc.inference.Generate
    bias = {"logit_bias": {FIRST: 90.0, FIRST + 3: 89.0}}
    answer = await generate(_request(sampling=bias, stop={"stop_strings": ["rettur"]}))
    assert (answer.text, list(answer.token_ids)) == ("tur", [FIRST, FIRST])
    answer = await generate(_request(sampling=bias, stop={"stop_token_ids": [FIRST]}))
    assert (answer.stop_token_id, answer.text) == (FIRST, "")
    # Special tokens are not text, and the tokenizer's own end token ends the answer.
    answer = await generate(_request(sampling={"logit_bias": {FIRST + 3: 90.0}}))
    assert (answer.text, list(answer.token_ids)) == ("", [FIRST + 3] * 6)
    answer = await generate(_request(sampling={"logit_bias": {END: 90.0}}))
    assert (answer.finish_reason, list(answer.token_ids)) == (answer.STOP, [END])
    for fields, path in (
        ({"sampling": {"logit_bias": {len(ADDED) + FIRST: 1.0}}}, "sampling.logit_bias"),
        ({"stop": {"stop_token_ids": [ROWS]}}, "stop.stop_token_ids[0]"),
        ({"adapters": [], "sampling": bias}, "sampling.logit_bias"),
    ):
        failure = await failure_of(generate(_request(**fields)))
        assert path in failure.violations, failure


async def test_constraints_use_the_adapters_tokens(protocols: Protocols) -> None:
    generate = protocols.rpc.inference.Generate
    choice = inference_pb2.Choice(texts=["turrets", "tower"])
    free = await generate(_request(choice=choice, stop={"max_tokens": 9}))
    assert free.text in choice.texts
    # The answer uses the added token if it is likelier, and letters if it is forbidden.
    bias = {"logit_bias": {FIRST: 90.0}}
    answer = await generate(_request(choice=choice, sampling=bias))
    assert (answer.text, answer.token_ids[0]) == ("turrets", FIRST)
    assert answer.token_ids[-1] == END
    spelled = await generate(
        _request(choice=choice, sampling={"logit_bias": {FIRST: -90.0}}, stop={"max_tokens": 9})
    )
    assert spelled.text in choice.texts
    assert FIRST not in spelled.token_ids
    together = [_request(choice=choice, sampling=bias), _request(choice=choice, adapters=[])]
    for _ in range(2):
        one, two = await asyncio.gather(*map(generate, together))
        assert (list(one.token_ids), two.text in choice.texts) == (list(answer_ids(one)), True)


def answer_ids(answer: inference_pb2.GenerateResponse) -> list[int]:
    assert answer.token_ids[0] == FIRST
    return list(answer.token_ids)


async def test_a_tokenizer_travels_with_its_adapter(
    protocols: Protocols, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is uploaded, served, exported, and replaced with another template."""
    async with AsyncTurretClient(protocols.rpc.rpc.address) as client:
        first = await client.adapters.upload("up", protocols.root / "grown")
        assert first.generation == 1
        tokens = await client.tokenize(ASK, adapters="up")
        assert tokens.text.startswith("<|user|>user: hi turret")
        await client.adapters.export("up", tmp_path / "out")
        names = {path.name for path in (protocols.root / "grown").iterdir()}
        assert {p.name for p in (tmp_path / "out").iterdir()} == names - {"README.md"}
        (tmp_path / "out" / "chat_template.jinja").write_text(TEMPLATE.replace("user|>", "end|>"))
        second = await client.adapters.upload("up", tmp_path / "out", replace=True)
        assert (second.generation, second.digest != first.digest) == (2, True)
        tokens = await client.tokenize(ASK, adapters="up")
        assert tokens.text.startswith("<|end|>user: hi turret")
        template = "<|end|>turret {{ messages[0].content }}"
        await client.adapters.upload("given", tmp_path / "out", chat_template=template)
        tokens = await client.tokenize(ASK, adapters="given")
        assert tokens.text == "<|end|>turret hi turret <|end|>"
        assert tokens.token_ids[:2] == (END, FIRST)
        # A request that was tokenised before the replacement is not answered after it.
        vocabulary = await protocols.engine.vocabulary_of("grown")

        async def before(*asked: Any, **more: Any) -> Any:
            return vocabulary

        monkeypatch.setattr(protocols.engine.backend.vocabularies, "of", before)
        failure = await failure_of(
            protocols.rpc.inference.Generate(
                _request(adapters=[adapters_pb2.AdapterWeight(name="up")], prompt="turret")
            )
        )
        assert failure.reason == "UNAVAILABLE"


async def test_an_adapter_with_its_own_vocabulary_is_neither_merged_nor_fused(
    protocols: Protocols,
) -> None:
    """The resulting base would have another number of tokens."""
    merge = adapters_pb2.MergeAdaptersRequest(adapters=WITH)
    failure = await failure_of(protocols.rpc.adapters.MergeAdapters(merge))
    assert failure.reasons == {"adapters": "NOT_MERGEABLE"}
    fuse = adapters_pb2.FuseAdaptersRequest(name="fused", adapters=WITH)
    failure = await failure_of(protocols.rpc.adapters.FuseAdapters(fuse))
    assert "grown" in failure.message
