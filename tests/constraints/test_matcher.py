"""A token is accepted without its mask if and only if the mask would allow it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from builders.constraints import tokens_of
from said import says
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.constraints.grammar import ConstraintKind, ConstraintSpec
from turret.server.constraints.matcher import Constraint, Matcher, without
from turret.server.errors import BudgetExceededError
from turret.server.models.tokenizer import Tokenizer

END, CALL = 0, 1
NAMES = ["<end>", "<call>"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["announcement", "an announced word", "<call>"]},
        "count": {"type": "integer", "maximum": 999},
        "said": {"type": "string", "maxLength": 6},
    },
    "required": ["name", "count", "said"],
    "additionalProperties": False,
}
# Constraints with forced texts, partly forced texts, counts, and special tokens by name and as
# text.
CONSTRAINTS: list[tuple[ConstraintKind, str]] = [
    ("json_schema", json.dumps(SCHEMA)),
    ("regex", "announcement(s| of a)? word{1,3}"),
    ("regex", "[a-z ]{3,30}[0-9]*"),
    ("regex", "an <call> (word|<end> of it)"),
    ("regex", "(<end>)+"),
    ("grammar", 'start: "a" <call> word "announcement"\nword: /[a-z]+ /'),
    ("grammar", "start: (<call> | /some/)+"),
    ("regex", "漢|é+x"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer with tokens of several letters, so that a text has many spellings."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True) for name in NAMES], show_progress=False,
    )  # fmt: skip
    words = ["announcement of a word", "an announced word", 'name": "', '{"count": 1', "<call"]
    backend.train_from_iterator(words * 9, trainer)
    size = backend.get_vocab_size()
    assert backend.encode("<end>a").ids[0] == END
    assert len(backend.encode("announcement").ids) < 4
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=NAMES[0])
    # The last tokens have no logits.
    return Tokenizer(inner, frozenset({END}), size - 3)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[ConstraintCompiler]:
    made = ConstraintCompiler(tokenizer)
    yield made
    made.close()


def behind(constraint: Constraint, tokens: list[int]) -> Matcher:
    matcher = constraint.matcher()
    for token in tokens:
        matcher.mask()
        matcher.advance(token)
    return matcher


@pytest.mark.parametrize(("kind", "text"), CONSTRAINTS)
def test_the_matcher_accepts_exactly_what_its_mask_allows(
    tokenizer: Tokenizer, compiler: ConstraintCompiler, kind: ConstraintKind, text: str
) -> None:
    constraint = compiler._compile(ConstraintSpec(kind, (text,)))
    rng = np.random.default_rng(0)
    num_taken = 0
    # After each token of a random answer, ``whole`` has the tokens that the grammar allows, and
    # ``allowed`` has those of them that the mask allows. Some allowed and some random tokens are
    # tried without the mask. ``taken`` is the token by which the matcher advances, or None if the
    # matcher needs the mask to decide.
    for withheld in (set[int](), {END}, set(map(int, rng.integers(0, 400, 200)))):
        answer: list[int] = []
        while len(answer) < 20:
            matcher = behind(constraint, answer)
            whole = tokens_of(matcher)
            allowed = whole - withheld or whole
            others = rng.integers(0, tokenizer.vocab_size + 3, 12).tolist()
            for token in [*rng.permutation(sorted(allowed))[:12].tolist(), *others]:
                trial = behind(constraint, answer)
                taken = trial.try_advance(token, withheld)
                if taken is None:
                    assert trial.num_tokens == len(answer)
                    assert tokens_of(trial) == whole
                    # If the check is conclusive for this token, the mask forbids the token, too.
                    is_sure = token not in withheld and compiler_is_sure(compiler, token)
                    assert token not in allowed or not is_sure
                    continue
                num_taken += 1
                assert taken == token or whole == {taken}
                assert taken in allowed
                # The state is the same as after an ordinary advance.
                assert trial.num_tokens == len(answer) + 1
                assert tokens_of(trial) == tokens_of(behind(constraint, [*answer, taken]))
            token = int(rng.choice(sorted(allowed)))
            if token == END and matcher._native.is_accepting():
                break
            answer.append(token)
    assert num_taken > 10


def compiler_is_sure(compiler: ConstraintCompiler, token: int) -> bool:
    found = compiler._tokenizer()
    assert isinstance(found, tuple)
    return found[1].is_plain(token)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("<end>", "<end>"),
        ("an <call> word", "an <call> word"),
        ("(<end>){2}|<call>", "<end><end>"),
        ("a(<end>|<call>)b", "a<call>b"),
    ],
)
def test_the_text_of_a_special_token_is_matched_as_characters(
    tokenizer: Tokenizer, compiler: ConstraintCompiler, expression: str, text: str
) -> None:
    """The library would expect the special token, and reject it."""
    constraint = compiler._compile(ConstraintSpec("regex", (expression,)))
    found = compiler._tokenizer()
    assert isinstance(found, tuple)
    native, _ = found
    matcher, spelled = constraint.matcher(), ""
    while spelled != text:
        allowed = sorted(tokens_of(matcher) - {END, CALL})
        pieces = {token: native.decode_bytes([token]).decode() for token in allowed}
        fitting = [t for t, piece in pieces.items() if text.startswith(spelled + piece)]
        assert fitting, (spelled, pieces)
        token = max(fitting, key=lambda t: len(pieces[t]))
        spelled += pieces[token]
        if matcher.try_advance(token) is None:
            matcher.advance(token)
    assert tokens_of(matcher) == {END}


def test_a_special_token_named_in_a_grammar_is_matched_as_a_token(
    compiler: ConstraintCompiler,
) -> None:
    spec = ConstraintSpec("grammar", ('start: "a" <call> "word"',))
    matcher = compiler._compile(spec).matcher()
    (a,) = tokens_of(matcher)
    matcher.advance(a)
    assert tokens_of(matcher) == {CALL}
    # The token has no text, so the mask decides.
    assert matcher.try_advance(CALL) is None
    matcher.advance(CALL)
    assert CALL not in tokens_of(matcher)


def test_banned_tokens_are_allowed_only_if_no_other_token_is() -> None:
    words = np.array([0b1011, 0, -(2**31)], dtype=np.int32)
    assert without(words, ()) is words
    assert without(words, {2, 64, 99, 5000}) is words
    left = without(words, {0, 95, 2})
    assert left.tolist() == [0b1010, 0, 0]
    assert words.tolist() == [0b1011, 0, -(2**31)]
    assert without(words, {0, 1, 3, 95}) is words


@pytest.mark.parametrize("how", ["try_advance", "mask"])
def test_an_answer_has_a_time_budget(
    compiler: ConstraintCompiler, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiler._compile(ConstraintSpec("regex", ("[a-z]+",))).matcher()
    monkeypatch.setattr("turret.server.constraints.matcher._FIRST_SECONDS", -1.0)
    with pytest.raises(BudgetExceededError, check=says("CONSTRAINT_TOO_SLOW")):
        matcher.try_advance(5) if how == "try_advance" else matcher.mask()
