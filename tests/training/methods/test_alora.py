"""aLoRA: trained on the positions on which it acts in the server, and masked before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import tiny_tokenizer
from builders.training import CHAT, TURNS, WORDS, resolve_tiny, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.training.base_model import load_model, without_peft_warnings
from turret.training.batches import make_batch
from turret.training.classifier import make_loss
from turret.training.engine import attach, trainable
from turret.training.examples import (
    Encoded,
    Example,
    encode,
    invocation_before_answers,
    invocation_of,
)
from turret.training.run.samples import draw_samples, model_answers
from turret.training.settings import DataConfig
from turret.training.trainer import Trainer
from turret.training.words import ConfigError, DataError

INVOCATION = "[judge]"
KEYS = ("method.name=alora", f"method.invocation={INVOCATION}", "method.rank=4")
RUN = (*KEYS, "base.dtype=float32", "run.adapter_dtype=float32", "optimizer.learning_rate=0.02")


def write_judged(path: Path) -> Path:
    """Prompts that contain the invocation, the invocation itself, and more text.

    Answers contain it, too.
    """
    rows = [
        {
            "prompt": f"[judge] {'la ' * (n % 4)}{n} {INVOCATION} the word:",
            "completion": WORDS[n % 8] + (f" {INVOCATION}" if n % 2 else ""),
        }
        for n in range(16)
    ]
    return write_jsonl(path, rows)


async def test_training_engine_and_peft_agree(tiny_llama: Path, tmp_path: Path) -> None:
    write_judged(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN)
    result = Trainer(resolved).run()
    tokens = tuple(resolved.base.tokenizer(INVOCATION, add_special_tokens=False)["input_ids"])
    config = json.loads((result.folder.adapter / "adapter_config.json").read_text())
    assert tuple(config["alora_invocation_tokens"]) == tokens
    assert len(tokens) > 1

    # Pass only the prompt, because PEFT would also search the answer, and begin there.
    (example,) = resolved.dataset.train[0]
    prompt = list(example.tokens[: example.learned.index(True)])
    start = len(prompt) - len("[judge] the word:")
    assert example.start == start
    base = load_model(resolved.base, "nf4-dense", torch.float32, "cpu")
    with without_peft_warnings():
        peft_model = PeftModel.from_pretrained(base, result.folder.adapter).eval()
    with torch.no_grad():
        logits = peft_model(input_ids=torch.tensor([prompt])).logits[0]
        # Both have the same results before the invocation, and different ones after it.
        with peft_model.disable_adapter():
            plain = base(input_ids=torch.tensor([prompt])).logits[0]
    assert torch.equal(logits[:start], plain[:start])
    assert not torch.isclose(logits[start:], plain[start:]).all(dim=1).any()

    def logprobs(scores: torch.Tensor) -> list[float]:
        found = scores.log_softmax(-1)[:-1]
        return found.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

    root = result.folder.path
    async with EngineHarness.start(tiny_llama, root) as harness:
        assert harness.registry.load("adapter", "adapter").facts.invocation == tokens
        answers = await harness.run_all(
            [make_request(prompt, *names, score=True) for names in (("adapter",), ())]
        )
    for answer, scores in zip(answers, (logits, plain), strict=True):
        assert answer.prompt_logprobs[1:] == pytest.approx(logprobs(scores), abs=1e-4)
    ours, the_bases = (answer.prompt_logprobs for answer in answers)
    assert ours[1 : start + 1] == the_bases[1 : start + 1]


def test_the_answer_is_not_searched_for_the_invocation(tiny_llama: Path, tmp_path: Path) -> None:
    write_judged(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN)
    attached = attach(resolved).eval()
    for parameter in trainable(attached).values():
        torch.nn.init.normal_(parameter, std=0.3)
    loss = make_loss(resolved, attached)
    rows = [row for row in resolved.dataset.train if row[0].tokens.count(ord("j") - 33) == 3]
    assert len(rows) > 2
    batch = make_batch(rows, pad=0, is_packed=False)
    assert batch.starts == tuple(row[0].start for row in rows)
    total = 0.0
    with torch.no_grad():
        for (example,) in rows:
            assert example.start is not None
            offset = [len(example.tokens) - example.start]
            ids = torch.tensor([example.tokens])
            scores = attached(input_ids=ids, alora_offsets=offset).logits[0].log_softmax(-1)
            for place, is_learned in enumerate(example.learned):
                total -= float(scores[place - 1, example.tokens[place]]) * is_learned
        assert float(loss(batch)) == pytest.approx(total, rel=1e-4)
        # The result differs if the invocation in the answer is used.
        (example,) = rows[0]
        ids = torch.tensor([example.tokens])
        own = attached(input_ids=ids).logits
        assert example.start is not None
        right = attached(input_ids=ids, alora_offsets=[len(example.tokens) - example.start]).logits
        assert not torch.allclose(own, right, rtol=1e-3)


def test_activations_may_be_recomputed(tiny_llama: Path, tmp_path: Path) -> None:
    write_judged(tmp_path / "train.jsonl")
    written = []
    for value in ("false", "true"):
        changes = (f"run.gradient_checkpointing={value}", f"run.output=is-{value}", "run.steps=3")
        folder = Trainer(resolve_tiny(tmp_path, tiny_llama, *RUN, *changes)).run().folder.adapter
        written.append(load_file(folder / "adapter_model.safetensors"))
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_sample_is_answered_from_the_invocation_on(tiny_llama: Path, tmp_path: Path) -> None:
    write_judged(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN)
    attached, tokenizer = attach(resolved).eval(), resolved.base.tokenizer
    for parameter in trainable(attached).values():
        torch.nn.init.normal_(parameter, std=0.3)
    (example,) = resolved.dataset.validation[0]
    (sample,) = draw_samples(model_answers(attached, tokenizer, "cpu"), tokenizer, [example])
    tokens = list(example.tokens[: example.learned.index(True)])
    count = len(tokens)
    assert example.start is not None
    with torch.no_grad():
        while len(tokens) < count + 12 and tokens[-1] != tokenizer.eos_token_id:
            offset = [len(tokens) - example.start]
            output = attached(input_ids=torch.tensor([tokens]), alora_offsets=offset)
            tokens.append(int(output.logits[0, -1].argmax()))
    whole = tokenizer.decode(tokens[count:], skip_special_tokens=True)
    assert whole
    assert whole.startswith(sample["after"]) or sample["after"].startswith(whole)
    assert sample["after"] != sample["before"]


# The last answer contains the beginning of the invocation.
NAMING = (*TURNS[:-1], {"role": "assistant", "content": "four <a>"})


def encoded(text: str, *, template: str | None = CHAT, loss_on: Any = "completion", **fields: Any):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    example = Example(Path("train.jsonl"), 7, **fields)
    config = DataConfig(train="train.jsonl", loss_on=loss_on)
    return encode(tokenizer, example, config, invocation_of(tokenizer, text))


def parts(item: Encoded) -> tuple[str, str]:
    """The text before the invocation, and the learned text."""
    pairs = zip(item.tokens, item.learned, strict=True)
    before = list(item.tokens[: item.start])
    decode = tiny_tokenizer().decode
    return str(decode(before)), str(decode([token for token, is_learned in pairs if is_learned]))


def test_tokens_before_the_last_invocation_are_masked() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    assert invocation_before_answers(tokenizer) == "<a>"
    before = "<u>one\n<a>two<eos>\n<u>three\n"
    item = encoded("<a>", messages=NAMING)
    assert parts(item) == (before, "four <a><eos>")
    assert item.turns == (("user", "one"), ("assistant", "two"), ("user", "three"))
    assert parts(encoded("<u>", messages=NAMING, loss_on="all")) == (
        before.removesuffix("<u>three\n"),
        "three\n<a>four <a><eos>",
    )
    # All answers after an invocation are learned.
    assert parts(encoded("one", messages=NAMING)) == ("<u>", "two<eos>four <a><eos>")
    assert parts(encoded("ne", prompt="one", completion="ne", template=None)) == ("o", "ne<eos>")


def test_an_example_without_the_invocation_is_reported() -> None:
    cases: dict[str, dict[str, Any]] = {
        "messages": {"messages": NAMING},
        "prompt": {"prompt": "one", "completion": "four"},
        "text": {"completion": "four"},
    }
    for field, told in cases.items():
        with pytest.raises(DataError, match=rf"^train.jsonl:7: {field}: ") as refused:
            encoded("four", **told)
        assert says("INVOCATION_MISSING", value="four")(refused.value)

    class Joining:
        """A tokenizer with a separate token for each text."""

        chat_template = None
        eos_token_id = 1

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

        def decode(self, tokens: list[int]) -> str:
            return "a [judge] b"

    joining = Joining()
    example = Example(Path("train.jsonl"), 7, prompt="a [judge] b", completion="c")
    with pytest.raises(DataError, check=says("INVOCATION_SPLIT", tokens="[7]")):
        encode(joining, example, DataConfig(train="t"), invocation_of(joining, "[judge]"))
    required = says("INVOCATION_REQUIRED")
    with pytest.raises(ConfigError, match=r"^method\.invocation: ", check=required):
        invocation_before_answers(tiny_tokenizer())
