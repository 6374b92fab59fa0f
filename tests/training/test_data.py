"""From examples to batches: learned tokens, contents of rows, and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders.bases.tiny_models import EOS, tiny_tokenizer
from builders.training import CHAT, TURNS, resolve_tiny, write_jsonl
from said import says

from turret.training.batches import IGNORED, BatchStream, make_batch, pack_rows, single_rows, split
from turret.training.examples import Encoded, Example, encode, encode_all
from turret.training.settings import DataConfig
from turret.training.words import DataError


def tokenizer(template: str | None = CHAT) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def example(**fields: Any) -> Example:
    return Example(Path("train.jsonl"), 7, **fields)


def config(**fields: Any) -> DataConfig:
    return DataConfig(train="train.jsonl", **fields)


def texts(encoded: Encoded) -> tuple[str, str]:
    """The whole text of an example, and its learned part."""
    decode = tokenizer().decode
    learned = [
        t for t, is_learned in zip(encoded.tokens, encoded.learned, strict=True) if is_learned
    ]
    return decode(list(encoded.tokens)), decode(learned)


def test_every_assistant_turn_is_learned_including_its_end_token():
    encoded = encode(tokenizer(), example(messages=TURNS), config())
    assert texts(encoded) == (
        "<u>one\n<a>two<eos>\n<u>three\n<a>four<eos>",
        "two<eos>four<eos>",
    )


def test_a_prompt_becomes_a_chat_turn_if_there_is_a_template():
    pair = example(prompt="one", completion="two")
    assert texts(encode(tokenizer(), pair, config())) == ("<u>one\n<a>two<eos>", "two<eos>")
    plain = ("onetwo<eos>", "two<eos>")
    assert texts(encode(tokenizer(), pair, config(template="none"))) == plain
    assert texts(encode(tokenizer(None), pair, config())) == plain
    whole = encode(tokenizer(), pair, config(loss_on="all"))
    assert texts(whole)[1] == "u>one\n<a>two<eos>"
    assert texts(encode(tokenizer(), example(completion="text"), config())) == (
        "text<eos>",
        "ext<eos>",
    )


def test_an_error_of_the_template_names_the_line():
    place = r"^train.jsonl:7: messages"
    with pytest.raises(DataError, match=f"{place}: ", check=says("NEEDS_CHAT_TEMPLATE")):
        encode(tokenizer(None), example(messages=TURNS), config())
    refuses = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match=f"{place}: ", check=says("CHAT_TEMPLATE_FAILED")):
        encode(tokenizer(refuses), example(messages=TURNS), config())
    forgets = "{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match=rf"{place}\[1\]: ", check=says("TEMPLATE_REWRITES")):
        encode(tokenizer(forgets), example(messages=TURNS), config())


def test_long_examples_are_dropped_truncated_or_refused():
    rows = [example(prompt="p", completion="c" * count) for count in (3, 9)]

    def encoded(too_long: Any, max_length: int = 8):
        return encode_all(tokenizer(None), rows, config(too_long=too_long, max_length=max_length))

    dropped = encoded("drop")
    assert (len(dropped.examples), dropped.num_dropped, dropped.num_truncated) == (1, 1, 0)
    cut = encoded("truncate")
    assert [len(item.tokens) for item in cut.examples] == [5, 8]
    assert (cut.num_dropped, cut.num_truncated) == (0, 1)
    too_many = says("TOO_MANY_TOKENS", found=11, most=8)
    with pytest.raises(DataError, match=r"^train.jsonl:7: ", check=too_many):
        encoded("error")
    with pytest.raises(DataError, check=says("ALL_TOO_LONG", found=5, most=4)):
        encoded("drop", 4)


def encoded_of(*lengths: int) -> list[Encoded]:
    """Examples with their number as all tokens; all tokens but the first are learned."""
    return [
        Encoded((number,) * length, (False,) + (True,) * (length - 1))
        for number, length in enumerate(lengths)
    ]


def test_targets_are_the_learned_tokens_shifted_by_one():
    pair = Encoded((1, 2, 3, 4), (False, False, True, True))
    batch = make_batch([(pair,), (encoded_of(2)[0],)], pad=EOS, is_packed=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [0, 0, EOS, EOS]]
    nothing = IGNORED
    assert batch.targets.tolist() == [[nothing, 3, 4, nothing], [0, nothing, nothing, nothing]]
    assert (batch.num_targets, batch.positions) == (3, None)


def test_packing_fills_rows_and_restarts_positions():
    examples = encoded_of(3, 5, 2, 6, 4)
    rows = pack_rows(examples, 8)
    assert sorted((e for row in rows for e in row), key=examples.index) == examples
    assert [sum(len(e.tokens) for e in row) for row in rows] == [8, 8, 4]
    batch = make_batch(rows, pad=EOS, is_packed=True)
    assert batch.positions is not None
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2],
        # Padding is a separate sequence.
        [0, 1, 2, 3, 0, 1, 2, 3],
    ]
    # No target belongs to the next example.
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert all(target in (IGNORED, token) for token, target in zip(row, targets, strict=True))
    assert batch.num_targets == sum(len(e.tokens) - 1 for e in examples)


def test_every_epoch_shows_every_row_once_in_a_new_order():
    rows = single_rows(encoded_of(*[2] * 7))

    def stream(seed: int = 0) -> BatchStream:
        return BatchStream(rows, batch_size=3, seed=seed)

    def shown(stream: BatchStream, first: int, count: int) -> list[int]:
        rows = [row for i in range(first, first + count) for row in stream.rows(i)]
        return [example.tokens[0] for (example,) in rows]

    three_epochs = shown(stream(), 0, 7)
    epochs = [three_epochs[start : start + 7] for start in (0, 7, 14)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # A stream that starts in the middle gives the same batches, and another seed different ones.
    assert shown(stream(), 4, 3) == three_epochs[12:]
    assert shown(stream(seed=1), 0, 7) != three_epochs


def test_the_split_is_disjoint_and_repeatable():
    examples = [example(completion=str(number)) for number in range(20)]
    kept, aside = split(examples, 0.1, 3)
    assert (len(kept), len(aside)) == (18, 2)
    assert sorted((*kept, *aside), key=lambda e: int(e.completion)) == examples
    assert split(examples, 0.1, 3) == (kept, aside)
    assert split(examples, 0.1, 4) != (kept, aside)
    assert split(examples, 0.0, 3) == (examples, [])
    assert split(examples[:1], 0.9, 3) == (examples[:1], [])


def test_an_example_in_both_sets_is_refused(tiny_llama: Path, tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "c"}, {"text": "b"}])
    place, twice = r"validation.jsonl:2: ", says("ALSO_IN_TRAINING", line=2)
    with pytest.raises(DataError, match=place, check=twice):
        resolve_tiny(tmp_path, tiny_llama, "data.validation=validation.jsonl")


def test_too_little_validation_data_is_noted(tiny_llama: Path, tmp_path: Path):
    def notes(texts: list[str], *overrides: str) -> str:
        write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
        return "\n".join(resolve_tiny(tmp_path, tiny_llama, *overrides).notes)

    assert notes(["a"]).startswith("no validation: 1 example to train on, too few")
    assert notes(["a"], "data.validation_fraction=0") == ""
    words = notes(["a", *"bcdefghij"])
    assert words == ""
    said = notes(["a"] * 20)
    assert said.startswith("the training examples also contain 2 examples of the validation set;")
