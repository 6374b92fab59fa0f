"""Compilation of constraints: correctness, errors with paths, caching, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from builders.bases.tiny_models import EOS
from builders.constraints import compiled, is_followed, make_tokenizer, tokens_of
from said import says
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from turret.server.constraints import compiler as compiler_module
from turret.server.constraints import matcher as constraint_module
from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.constraints.grammar import ConstraintKind, ConstraintSpec
from turret.server.constraints.matcher import Constraint, KeptConstraints
from turret.server.errors import BudgetExceededError, InvalidRequestError, QueueFullError
from turret.server.models.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Iterator[ConstraintCompiler]:
    made = ConstraintCompiler(tokenizer)
    yield made
    made.close()


def schema(value: Any) -> ConstraintSpec:
    return ConstraintSpec("json_schema", (json.dumps(value),))


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", "[a-c]{2,3}x", ["abx", "cccx"], ["ax", "abcax", "abx "]),
        ("regex", "^(yes|no)$", ["yes", "no"], ["yesno", ""]),
        ("regex", "é|漢", ["é", "漢"], ["e"]),
        ("grammar", 'start: "a" b\nb: "b" | b "b"', ["ab", "abbb"], ["a", "b"]),
        ("grammar", 'root ::= "a" ("b" | [0-9]+)', ["ab", "a12"], ["a", "abb"]),
        ("json_object", "", ["{}", '{"a": [1, null]}', '{\n "a": "\\né"}'], ["[]", '{"a":}']),
        (
            "json_schema", json.dumps(PERSON),
            ['{"name":"Bo","age":3}', '{ "name": "Bo",\n "age": 130, "tags": ["a", "b"] }'],
            ['{"age":3,"name":"Bo"}', '{"name":"Bo","age":131}', '{"name":"Bo"}', "{" + 40 * " "],
        ),
        # This format constrains nothing. Inside a constant, "format" is not a keyword.
        (
            "json_schema", json.dumps({"prefixItems": [
                {"type": "string", "format": "password"}, {"const": {"format": "password"}},
            ], "type": "array", "minItems": 2}),
            ['["a",{"format":"password"}]'], ['[1,{"format":"password"}]', '["a",{}]'],
        ),
    ],
)  # fmt: skip
def test_each_constraint_accepts_and_rejects_the_expected_answers(
    tokenizer: Tokenizer, kind: ConstraintKind, text: str, good: list[str], bad: list[str]
) -> None:
    constraint = compiled(kind, *([text] if text else []))
    for answer in good:
        assert is_followed(constraint, tokenizer.encode(answer)), answer
    for answer in bad:
        assert not is_followed(constraint, tokenizer.encode(answer)), answer


@pytest.mark.parametrize(
    ("letters", "most"), [("a-z ", 9), ("a-z ", 40), ("a-zA-Z ", 40), ("a-zA-Z ,.7", 40)]
)
def test_counted_letters_allow_the_tokens_that_fit(letters: str, most: int) -> None:
    """A slice of the vocabulary is allowed as a whole if and only if all of its tokens fit."""
    words = ("hear ye an announcement of unconstitutional Words, Some 7. of " * 9).title().split()
    text = [" ".join(words[n:]) for n in range(len(words))]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    backend.train_from_iterator([*text, *map(str.lower, text)], trainer)
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    size = backend.get_vocab_size()
    made = ConstraintCompiler(Tokenizer(inner, frozenset({0}), size))
    expression = f"[{letters}]{{1,{most}}}"
    matcher = made._compile(ConstraintSpec("regex", (expression,))).matcher()
    made.close()
    texts = {token: backend.decode([token]) for token in range(1, size)}
    assert max(map(len, texts.values())) > 16
    rng = np.random.default_rng(0)
    so_far = ""
    while True:
        fitting = {t for t, piece in texts.items() if re.fullmatch(expression, so_far + piece)}
        assert tokens_of(matcher) == fitting | ({0} if so_far else set())
        if not fitting:
            break
        token = int(rng.choice(sorted(fitting)))
        matcher.advance(token)
        so_far += texts[token]
    assert len(so_far) == most


def test_choices_are_taken_literally(tokenizer: Tokenizer) -> None:
    texts = ("a.b", "(x)|[y]", "$5 & ~#-/\\", 'say "hi"\n', "ünï", "a")
    constraint = compiled("choice", *texts)
    for text in texts:
        assert is_followed(constraint, tokenizer.encode(text)), text
    for text in ("axb", "", "x", "a.", "ü"):
        assert not is_followed(constraint, tokenizer.encode(text)), text


def test_random_walks_through_a_schema_give_valid_values(tokenizer: Tokenizer) -> None:
    constraint = compiled("json_schema", json.dumps(PERSON))
    rng = np.random.default_rng(0)
    for _ in range(20):
        matcher, answer = constraint.matcher(), []
        while (allowed := tokens_of(matcher)) != {EOS}:
            assert EOS not in allowed
            # Leave out blanks, which are bounded but would dominate a random walk.
            wanted = sorted(allowed - set(tokenizer.encode(" \n\t\r"))) or sorted(allowed)
            answer.append(int(rng.choice(wanted)))
            matcher.advance(answer[-1])
        text = tokenizer.decode(answer)
        person = json.loads(text)
        assert [*person] in (["name", "age"], ["name", "age", "tags"])
        assert len(person["name"]) <= 8
        assert person["age"] in range(131)
        assert set(person.get("tags", [])) <= {"a", "b"}
        assert len(person.get("tags", [])) <= 2


@pytest.mark.parametrize(
    ("spec", "paths", "reason"),
    [
        (schema({"uniqueItems": True}), ["json_schema.uniqueItems"], "KEYWORD_UNSUPPORTED"),
        (
            schema({"properties": {"a": {"items": {"not": {}}}}, "$defs": {"b": {"if": {}}}}),
            ["json_schema.properties.a.items.not"], "KEYWORD_UNSUPPORTED",
        ),
        (
            schema({"anyOf": [{}, {"type": "object", "propertyNames": {}, "minContains": 2}]}),
            ["json_schema.anyOf[1].propertyNames", "json_schema.anyOf[1].minContains"],
            "KEYWORD_UNSUPPORTED",
        ),
        # The name of a property is not a keyword.
        (
            schema({"properties": {"not": {"type": "string", "format": "bogus"}}}),
            ["json_schema.properties.not.format"], "FORMAT_UNSUPPORTED",
        ),
        (
            schema({"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}),
            ["json_schema.properties.a.pattern"], "PATTERN_INVALID",
        ),
        (
            schema({"allOf": [{"$ref": "#/$defs/x"}]}),
            ["json_schema.allOf[0].$ref"], "REFERENCE_UNKNOWN",
        ),
        (schema({"$ref": "https://example.org/x"}), ["json_schema.$ref"], "REFERENCE_UNKNOWN"),
        (
            schema({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}),
            ["json_schema.oneOf"], "ONE_OF_UNSUPPORTED",
        ),
        (schema({"type": "foo"}), ["json_schema"], "CONSTRAINT_INVALID"),
        (
            schema({"type": "integer", "minimum": 5, "maximum": 1}),
            ["json_schema"], "CONSTRAINT_INVALID",
        ),
        (schema({"$ref": "#"}), ["json_schema"], "CONSTRAINT_TOO_COMPLEX"),
        (schema([1]), ["json_schema"], "NOT_A_JSON_OBJECT"),
        (ConstraintSpec("json_schema", ("{",)), ["json_schema"], "NOT_JSON"),
        (ConstraintSpec("json_schema", ("[" * 60_000,)), ["json_schema"], "NOT_JSON"),
        (ConstraintSpec("json_schema", ('{"minimum": NaN}',)), ["json_schema"], "NOT_JSON"),
        (ConstraintSpec("regex", ("(a",)), ["regex"], "PATTERN_INVALID"),
        (ConstraintSpec("regex", (r"\bx",)), ["regex"], "PATTERN_INVALID"),
        (ConstraintSpec("grammar", ('foo: "a"',)), ["grammar"], "GRAMMAR_INVALID"),
        (ConstraintSpec("grammar", ("start: start",)), ["grammar"], "CONSTRAINT_TOO_COMPLEX"),
        (ConstraintSpec("grammar", ("root ::= ((",)), ["grammar"], "GRAMMAR_INVALID"),
        (ConstraintSpec("grammar", ("start: @other",)), ["grammar"], "CONSTRAINT_INVALID"),
    ],
)  # fmt: skip
async def test_an_unsupported_schema_is_rejected_with_its_path(
    compiler: ConstraintCompiler, spec: ConstraintSpec, paths: list[str], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, check=says(reason)) as refused:
        await compiler.compile(spec)
    assert sorted(path for path, _ in refused.value.violations) == sorted(paths)
    assert all(len(why) < 400 for _, why in refused.value.violations)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "b(a{1000}){1000}|cx"),
        ("json_schema", '{"type":"string","pattern":"^(a{1000}){1000}$"}'),
        ("grammar", 'start: "b" ' + "A " * 3000 + '| "cx"\nA: "' + "ab" * 1500 + '"'),
    ],
)
async def test_a_forced_text_of_megabytes_is_not_tokenized(
    compiler: ConstraintCompiler, kind: ConstraintKind, text: str
) -> None:
    """The library would hold the GIL for seconds while it tokenizes the text."""
    matcher = (await compiler.compile(ConstraintSpec(kind, (text,)))).matcher()
    start = time.thread_time()
    for _ in range(4):
        words = matcher.mask()
        token = int(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0][0])
        assert matcher.try_advance(token) == token
    assert time.thread_time() - start < 0.5


async def test_equal_constraints_are_compiled_once(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = []
    compile_one = ConstraintCompiler._compile

    def counted(self: ConstraintCompiler, spec: ConstraintSpec) -> Constraint:
        compilations.append(spec)
        return compile_one(self, spec)

    monkeypatch.setattr(ConstraintCompiler, "_compile", counted)
    spec = ConstraintSpec("regex", ("a+",))
    first, *others = await asyncio.gather(*(compiler.compile(spec) for _ in range(5)))
    assert all(other is first for other in others)
    assert await compiler.compile(ConstraintSpec("regex", ("a+",))) is first
    assert len(compilations) == 1
    # A list of two texts is not the same constraint as one text, nor a grammar as a regex.
    for other in (("choice", "a", "+"), ("choice", "a+"), ("grammar", 'start: "a+"')):
        assert await compiler.compile(ConstraintSpec(other[0], other[1:])) is not first  # type: ignore[arg-type]
    monkeypatch.setattr(constraint_module, "MAX_CACHED", 2)
    for i in range(3):
        await compiler.compile(ConstraintSpec("regex", (f"b{i}",)))
    assert len(compiler.kept) == 2
    assert await compiler.compile(spec) is not first
    monkeypatch.setattr(constraint_module, "MAX_CACHED_BYTES", 1)
    await compiler.compile(ConstraintSpec("regex", ("c",)))
    assert (len(compiler.kept), compiler.kept.num_bytes) == (0, 0)


async def test_vocabularies_share_one_budget(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptConstraints()
    first, second = (ConstraintCompiler(tokenizer, kept) for _ in range(2))
    spec = ConstraintSpec("regex", ("a+",))
    one, other = await first.compile(spec), await second.compile(spec)
    assert one is not other
    assert await first.compile(spec) is one
    assert await second.compile(spec) is other
    assert kept.num_bytes == one.num_bytes + other.num_bytes
    monkeypatch.setattr(constraint_module, "MAX_CACHED_BYTES", 2 * one.num_bytes)
    await second.compile(ConstraintSpec("regex", ("b+",)))
    # The least recently used constraint was dropped, regardless of its compiler.
    assert await second.compile(spec) is other
    assert await first.compile(spec) is not one
    first.forget()
    assert (len(kept), kept.num_bytes) == (1, one.num_bytes)
    assert await second.compile(spec) is other
    for made in (first, second):
        made.close()


async def test_a_constraint_that_needs_too_much_memory_is_rejected(
    compiler: ConstraintCompiler,
) -> None:
    """Without the limit, the constraint would take 770 MB."""
    for kind, text in (
        ("regex", "a?" * 20_000),
        ("grammar", "start: A\nA: /" + "a?" * 20_000 + "/"),
    ):
        with pytest.raises(InvalidRequestError, check=says("CONSTRAINT_TOO_COMPLEX")):
            await compiler.compile(ConstraintSpec(kind, (text,)))  # type: ignore[arg-type]
    # The process that tries a grammar knows the tokens that the grammar names.
    grammar = "start: <eos> | <[0-257]>\n" + "// a comment\n" * 100
    assert isinstance(await compiler.compile(ConstraintSpec("grammar", (grammar,))), Constraint)


async def test_the_memory_of_constraints_in_use_is_limited_and_shared(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_module, "MAX_HELD_BYTES", 150 << 20)
    monkeypatch.setattr(constraint_module, "MAX_CACHED", 0)

    async def made(number: int, tenant: bytes) -> Constraint:
        # Each constraint takes 48 MB.
        spec = ConstraintSpec("regex", ("a?" * 5000 + str(number),))
        return await compiler.compile(spec, tenant)

    held = [await made(0, b"alice")]
    assert held[0].num_bytes > 40 << 20
    for number in (1, 2):
        with pytest.raises(QueueFullError, check=says("CONSTRAINTS_FULL")):
            await made(number, b"alice")
    held.append(await made(3, b"bob"))
    del held[0]
    held.append(await made(1, b"alice"))


async def test_a_cancelled_caller_does_not_affect_the_others(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    compile_one = ConstraintCompiler._compile

    def waiting(self: ConstraintCompiler, spec: ConstraintSpec) -> Constraint:
        may_go_on.wait(30)
        return compile_one(self, spec)

    monkeypatch.setattr(ConstraintCompiler, "_compile", waiting)
    monkeypatch.setattr(compiler_module, "MAX_RUNNING", 1)
    spec = ConstraintSpec("regex", ("a",))
    left, stays = (asyncio.ensure_future(compiler.compile(spec)) for _ in range(2))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(QueueFullError):
        await compiler.compile(ConstraintSpec("regex", ("b",)))
    may_go_on.set()
    assert isinstance(await stays, Constraint)
    monkeypatch.setattr(compiler_module, "COMPILE_SECONDS", 0.01)
    may_go_on.clear()
    with pytest.raises(BudgetExceededError, check=says("COMPILATION_TOO_SLOW")):
        await compiler.compile(ConstraintSpec("regex", ("b",)))
    may_go_on.set()


async def test_compilation_alternates_between_bearer_tokens(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, order = threading.Event(), []
    compile_one = ConstraintCompiler._compile

    def waiting(self: ConstraintCompiler, spec: ConstraintSpec) -> Constraint:
        may_go_on.wait(30)
        order.append(spec.texts[0])
        return compile_one(self, spec)

    monkeypatch.setattr(ConstraintCompiler, "_compile", waiting)
    number = compiler_module.MAX_RUNNING_OF_TOKEN
    asked = [
        asyncio.ensure_future(compiler.compile(ConstraintSpec("regex", (f"a{i}",)), b"alice"))
        for i in range(number)
    ]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, check=says("TOO_MANY_COMPILATIONS_OF_TOKEN")):
        await compiler.compile(ConstraintSpec("regex", ("a",)), b"alice")
    asked.append(asyncio.ensure_future(compiler.compile(ConstraintSpec("regex", ("b",)), b"bob")))
    await asyncio.sleep(0)
    may_go_on.set()
    await asyncio.gather(*asked)
    # The threads had already begun the first jobs of Alice's token.
    assert order.index("b") <= 2 + compiler_module.NUM_THREADS
    assert isinstance(await compiler.compile(ConstraintSpec("regex", ("a",)), b"alice"), Constraint)


async def test_tokenizers_that_do_not_support_constraints() -> None:
    class Odd:
        eos_token_ids: frozenset[int] = frozenset()
        vocab_size = 5

        def serialized(self) -> str:
            return "{}"

    odd = Odd()
    for ends, reason in (
        (frozenset[int](), "NO_END_TOKEN"),
        (frozenset({1}), "TOKENIZER_UNUSABLE"),
    ):
        odd.eos_token_ids = ends
        made = ConstraintCompiler(odd)
        with pytest.raises(InvalidRequestError, check=says(reason)) as refused:
            await made.compile(ConstraintSpec("json_object"))
        assert refused.value.violations[0][0] == "json_object"
        made.close()


def test_a_mask_of_an_ambiguous_grammar_takes_a_limited_number_of_steps() -> None:
    """All running requests wait for each mask."""
    texts = [letter * times for letter in "ab" for times in range(1, 90)]
    vocab = {text: number for number, text in enumerate(["<end>", *texts])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    made = ConstraintCompiler(Tokenizer(inner, frozenset({0}), len(vocab)))
    for rule, is_ambiguous in (("e e | e e e | w", True), ('e "a" | e "b" e | w', False)):
        spec = ConstraintSpec("grammar", (f"start: e\ne: {rule}\nw: /[a-z]/",))
        refused = pytest.raises(InvalidRequestError, check=says("CONSTRAINT_TOO_COMPLEX"))
        with refused if is_ambiguous else contextlib.nullcontext():
            made._compile(spec)
    made.close()


async def test_panics_of_the_library_are_errors(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panics are not Exceptions, so no caller would catch them."""

    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("of the library")

    made = ConstraintCompiler(tokenizer)
    await made.compile(ConstraintSpec("json_object"))
    monkeypatch.setattr(compiler_module, "grammar_of", panic)
    with pytest.raises(RuntimeError, match="panic: of the library"):
        await made.compile(schema({}))
    made.close()
    monkeypatch.setattr(compiler_module, "LLTokenizer", panic)
    made = ConstraintCompiler(tokenizer)
    with pytest.raises(InvalidRequestError, check=says("TOKENIZER_UNUSABLE")):
        await made.compile(schema({}))
    made.close()


def test_an_answer_does_not_depend_on_earlier_use_of_the_lexer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compiler_module._LIMITS, "max_lexer_states", 400)
    constraint = compiled("regex", "[ab]*a[ab]{12}")
    renewals: list[Constraint] = []
    renew = Constraint._renew

    def noted(self: Constraint) -> None:
        renewals.append(self)
        renew(self)

    monkeypatch.setattr(Constraint, "_renew", noted)
    rng = np.random.default_rng(0)
    for _ in range(60):
        text = "".join(rng.choice(list("ab"), 40))
        matcher = constraint.matcher()
        for token in tokenizer.encode(text):
            assert token in tokens_of(matcher)
            matcher.advance(token)
    assert renewals, "the lexer never filled up"


def test_a_constraint_that_is_too_slow_ends_only_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constraint = compiled("regex", "a*")
    clock = iter(range(0, 1000, 1))
    slow = constraint.matcher()
    monkeypatch.setattr("turret.server.constraints.matcher.time.thread_time", lambda: next(clock))
    for _ in range(2):
        slow.mask()
    with pytest.raises(BudgetExceededError, check=says("CONSTRAINT_TOO_SLOW")):
        slow.mask()
    monkeypatch.undo()
    assert EOS in tokens_of(constraint.matcher())
