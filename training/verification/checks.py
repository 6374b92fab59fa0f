"""The checks of ``turret verify``.

Each answer of the server is compared with PEFT's forward pass over the same tokens, on the same
base in fp32. PEFT in bf16 shows which difference rounding alone explains.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from turret.training.base_model import TrainingBase, Weights, load_model, without_peft_warnings
from turret.training.verification.client import Continuation, VerifiedServer
from turret.training.words import RunError


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The model's log probabilities for an answer, given its prompt.

    Returns:
        ``[tokens, 2]`` in fp32: the log probability of each token of the answer, and that of the
        likeliest token in its place.
    """
    # Index from the end: with a soft prompt, there are more logits than tokens.
    ids = torch.tensor([[*prompt, *answer]])
    with without_peft_warnings():
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
    rows = logits.float().log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(answer)[:, None])
    return torch.cat((chosen, rows.max(1, keepdim=True).values), dim=1)


class Adapted:
    """A base model with an adapter; groups of the adapter's tensors can be left out.

    Attributes:
        model: The model; its forward pass uses the adapter.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        config = PeftConfig.from_pretrained(str(directory))
        for name in ("init_lora_weights", "init_weights"):
            # An adapter with random initial weights would change the base.
            if getattr(config, name, None) is False:
                setattr(config, name, True)
        self.model = PeftModelForCausalLM(model, config)  # type: ignore[arg-type]
        self._fresh = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self._fresh = {key: value.clone() for key, value in self._fresh.items()}
        self._file = load_peft_weights(str(directory), device="cpu")
        self._put(self._file)
        self.model.eval()

    def _put(self, state: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, dict(state))

    def groups(self) -> dict[str, list[str]]:
        """The file's keys by kind of module, such as ``q_proj``; empty if there is only one."""
        prefix = getattr(self.model.base_model, "prefix", None)
        found: dict[str, list[str]] = {}
        for key in sorted(self._file.keys() & self._fresh.keys()):
            module = re.split(rf"\.{re.escape(prefix)}", key)[0] if prefix else key
            if module == key:
                module = key.rpartition(".")[0]
            found.setdefault(module.rpartition(".")[2] or key, []).append(key)
        return found if len(found) > 1 else {}

    @contextlib.contextmanager
    def without(self, keys: Sequence[str]) -> Iterator[None]:
        """Use the adapter without some of its tensors: they have the values of a new adapter."""
        self._put({**self._file, **{key: self._fresh[key] for key in keys}})
        try:
            yield
        finally:
            self._put(self._file)


@contextlib.contextmanager
def adapted(model: Any, directory: Path) -> Iterator[Adapted]:
    """Put an adapter on a model, and remove it at the end of the block."""
    with without_peft_warnings():
        made = Adapted(model, directory)
    try:
        yield made
    finally:
        # A soft prompt does not change the model.
        if not made.model.active_peft_config.is_prompt_learning:
            # PEFT leaves its copies of ``modules_to_save`` in place.
            originals = {
                name: module.original_module
                for name, module in model.named_modules()
                if isinstance(module, ModulesToSaveWrapper)
            }
            made.model.unload()
            for name, original in originals.items():
                model.set_submodule(name, original)


# A difference is explained by rounding if it is at most this many times that of PEFT in bf16.
_ROUNDINGS = 2.0
# Keys have no effect if the answers are this many times closer to those of an adapter without them.
_NEARER = 2.0
# The number of requests at the same time.
_AT_ONCE = 16
_NAME = "turret-verify"
BASE = "base"
DEFAULT_PROMPTS = (
    "The capital of France is",
    "Question: Why is the sky blue?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Translate to German: Good morning, my friend.\n",
    "The three most important things about health are",
)


@dataclass(slots=True)
class Verdict:
    """The result for one adapter, or for the base.

    Attributes:
        name: The adapter's name on the server.
        tokens: The number of compared tokens.
        same: The number of tokens that PEFT in fp32 would choose too. Another token also counts if
            rounding explains why the server chose it.
        error: The mean difference between the server's log probabilities and PEFT's in fp32.
        rounding: The same for PEFT in bf16 on the same base.
        without_effect: Kinds of modules whose keys had no effect; ``*`` means the whole adapter.
        mixed: The number of answers that change when requests for other adapters run at the same
            time.
        reloaded: The number of answers that differ after another adapter had the same name; None
            if the server did not load an adapter.
        problem: Why the adapter was not compared; empty if it was.
    """

    name: str
    tokens: int = 0
    same: int = 0
    error: float = 0.0
    rounding: float = 0.0
    without_effect: list[str] = field(default_factory=list)
    mixed: int = 0
    reloaded: int | None = None
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the answers are PEFT's up to rounding, and independent of other requests."""
        is_near = self.same == self.tokens > 0 and self.error <= _ROUNDINGS * self.rounding
        return is_near and not (self.problem or self.without_effect or self.mixed or self.reloaded)


@dataclass(frozen=True, slots=True)
class _Case:
    """An answer to a prompt; ``ids`` are its first tokens, those that can be compared."""

    prompt: list[int]
    ids: list[int]
    logprobs: torch.Tensor


def verify(
    server: VerifiedServer,
    base: TrainingBase,
    weights: Weights,
    adapters: Mapping[str, Path],
    *,
    prompts: Sequence[str],
    max_tokens: int,
    on_phase: Callable[[str], None],
) -> list[Verdict]:
    """Compare the base and all adapters with PEFT.

    Args:
        server: The server.
        base: The base model of the reference.
        weights: The base's weights: ``full`` as in the checkpoint, ``nf4`` as turret serves them.
        adapters: The server's name of each adapter → the directory that PEFT wrote.
        prompts: The texts that the server continues.
        max_tokens: Maximum number of tokens of each answer.
        on_phase: Called with a description of each phase.

    Returns:
        A verdict on the base, and one on each adapter.

    Raises:
        RunError: The server cannot be reached, or its answers lack what the comparison needs.
    """
    dense: Weights = "nf4-dense" if weights == "nf4" else weights
    tokenizer = base.tokenizer
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    verdicts = {name: Verdict(name) for name in (BASE, *adapters)}

    on_phase("asking the server for each answer alone")
    alone = {
        name: [server.ask(None if name == BASE else name, ids, max_tokens) for ids in encoded]
        for name in verdicts
    }
    on_phase("asking for all answers at once")
    ask_together(server, encoded, max_tokens, alone, verdicts)
    on_phase("loading adapters under one name, one after another")
    reload(server, adapters, encoded, max_tokens, alone, verdicts)

    cases = {
        name: [
            case
            for prompt, ids, answer in zip(prompts, encoded, answers, strict=True)
            if (case := _case(tokenizer, prompt, ids, answer))
        ]
        for name, answers in alone.items()
    }
    on_phase("computing PEFT's answers in fp32")
    model = load_model(base, dense, torch.float32, "cpu").eval()
    exact = {
        name: _compare(model, adapters.get(name), cases[name], verdicts[name]) for name in verdicts
    }
    del model
    gc.collect()
    on_phase("computing PEFT's answers in bf16")
    model = load_model(base, dense, torch.bfloat16, "cpu").eval()
    suspects = []
    for name, verdict in verdicts.items():
        if verdict.problem:
            continue
        rough = _rows(model, adapters.get(name), cases[name])
        _judge(verdict, cases[name], exact[name], rough)
        if verdict.error > _ROUNDINGS * verdict.rounding and name in adapters:
            suspects.append(name)
    del model
    gc.collect()
    if suspects:
        on_phase("looking for keys without effect")
        model = load_model(base, dense, torch.float32, "cpu").eval()
        for name in suspects:
            _find_unused(model, adapters[name], cases[name], verdicts[name])
    return list(verdicts.values())


def ask_together(
    server: VerifiedServer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    alone: Mapping[str, Sequence[Continuation]],
    verdicts: Mapping[str, Verdict],
) -> None:
    """Request all answers again, for different adapters at once, and count those that change."""
    places = [(name, number) for number in range(len(prompts)) for name in verdicts]

    def ask(place: tuple[str, int]) -> Continuation:
        name, number = place
        return server.ask(None if name == BASE else name, prompts[number], max_tokens)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for (name, number), answer in zip(places, pool.map(ask, places), strict=True):
            verdicts[name].mixed += answer != alone[name][number]


def reload(
    server: VerifiedServer,
    adapters: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    alone: Mapping[str, Sequence[Continuation]],
    verdicts: Mapping[str, Verdict],
) -> None:
    """Serve all adapters one after another under one name; the server must not mix them up."""
    # Repeat the first adapter at the end, so that even a single adapter is loaded twice.
    for name in (*adapters, *list(adapters)[:1]):
        try:
            server.load(_NAME, adapters[name])
        except RunError:
            # Many servers cannot load adapters, or only with a setting.
            return
        try:
            found = [server.ask(_NAME, ids, max_tokens) for ids in prompts]
        finally:
            server.unload(_NAME)
        differing = sum(a != b for a, b in zip(found, alone[name], strict=True))
        verdicts[name].reloaded = (verdicts[name].reloaded or 0) + differing


def _case(tokenizer: Any, prompt: str, ids: list[int], answer: Continuation) -> _Case | None:
    """The answer's tokens, or None if the server does not report them."""
    tokens = [token for token in answer.tokens if isinstance(token, int)]
    if len(tokens) < len(answer.tokens):
        tokens = tokenizer(prompt + answer.text).input_ids[len(ids) :]
        if [tokenizer.decode([token]) for token in tokens] != list(answer.tokens)[: len(tokens)]:
            return None
    # llama.cpp omits tokens that end within a character. After such a token, the context of the
    # others is not known, so do not compare them.
    count, before = 0, tokenizer.decode(ids, skip_special_tokens=True)
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode([*ids, *tokens[:end]], skip_special_tokens=True)
        if (before + answer.text).startswith(text):
            count = end
        elif not text.endswith("\ufffd"):
            break
    return _Case(ids, tokens[:count], torch.tensor(answer.logprobs[:count])) if count else None


def _rows(model: Any, directory: Path | None, cases: Sequence[_Case]) -> Tensor:
    if directory is None:
        return _all_rows(model, cases)
    with adapted(model, directory) as made:
        return _all_rows(made.model, cases)


def _all_rows(model: Any, cases: Sequence[_Case]) -> Tensor:
    return torch.cat([logprobs_of(model, case.prompt, case.ids) for case in cases])


def _compare(
    model: Any, directory: Path | None, cases: Sequence[_Case], verdict: Verdict
) -> Tensor:
    """PEFT's result in fp32; a problem with the adapter is recorded in the verdict."""
    if not cases:
        verdict.problem = "the tokens of the answers are not known"
        return torch.empty(0, 2)
    try:
        return _rows(model, directory, cases)
    except Exception as error:
        # PEFT has no common error for a directory that it cannot load.
        verdict.problem = f"PEFT: {type(error).__name__}: {error}"
        return torch.empty(0, 2)


def _judge(verdict: Verdict, cases: Sequence[_Case], exact: Tensor, rough: Tensor) -> None:
    served = torch.cat([case.logprobs for case in cases])
    rounding = (rough[:, 0] - exact[:, 0]).abs()
    verdict.tokens = len(served)
    verdict.error = float((served - exact[:, 0]).abs().mean())
    verdict.rounding = float(rounding.mean())
    lead = exact[:, 1] - exact[:, 0]
    verdict.same = int((lead <= _ROUNDINGS * rounding.max()).sum())


def _find_unused(model: Any, directory: Path, cases: Sequence[_Case], verdict: Verdict) -> None:
    """Find the keys that the server ignores: without them, PEFT answers as the server does."""
    served = torch.cat([case.logprobs for case in cases])

    def error(found: Any) -> float:
        return float((served - _all_rows(found, cases)[:, 0]).abs().mean())

    errors = {"*": error(model)}
    with adapted(model, directory) as made:
        for kind, keys in made.groups().items():
            with made.without(keys):
                errors[kind] = error(made.model)
    least = min(errors.values())
    if least * _NEARER <= verdict.error:
        verdict.without_effect = [kind for kind, value in errors.items() if value == least]
