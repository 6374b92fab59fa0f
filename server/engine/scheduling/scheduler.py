"""Decides what each step computes. Pure Python: no torch, no clock, no threads.

Continuous batching with chunked prefill. A step takes up to ``max_num_batched_tokens`` tokens:
first one of each running sequence that decodes, then chunks of the other running sequences'
prompts, then waiting sequences in the order of ``FairQueue``. A sequence is admitted if all
sequences that run with it will probably have room for their answers (``LengthForecast``). If blocks
still run out, the sequence that was admitted last is preempted: its blocks are freed, and it is
recomputed later (its tokens are kept). A chunk ends where other adapters begin to act, so one mix
acts on all of it. A waiting sequence whose adapters are still loading is skipped and delays no
other. A step's remaining room goes to draft tokens (``Drafts``), which are further rows of their
sequences.

While sequences decode, a step takes fewer prompt tokens (``_step_tokens``), and even fewer of
prompts that are far into their context (``_chunk``). Tenants share these tokens (``_shares``).

Fairness also applies to running places, not only admissions. Once the sequence that is next in line
has waited for ``preempt_after_seconds``, it takes the place of another. This is the latest sequence
of the tenant with the most places, if that makes their places more equal. Otherwise it is the
latest sequence of the most served mix, if that mix was served more and holds more places.
By the same rule, a sequence that waits for memory for its adapters takes the memory of another mix.
Callers pass the current time.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.fair_queue import FairQueue
from turret.server.engine.scheduling.sequence import (
    HeldBlocks,
    Scheduled,
    Sequence,
    SequenceState,
    Step,
)
from turret.server.engine.speculation import Speculation, StepCost
from turret.server.errors import InvalidRequestError
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.adapters.adapter import Mix

# The extra pass of a sequence that gives an adapter its scalings.
#
# X-LoRA weighs its components by the final states of another pass over the same tokens: the base
# model's or, with a ``scaling_pass_value``, its own at constant scalings. This *first pass* is a
# sequence of its own, with the same tokens and with its own keys and values.


def add_first_pass(sequence: Sequence) -> None:
    """Give a sequence the first pass that its mix needs, if it needs one.

    Raises:
        InvalidRequestError: The mix contains two adapters that need a first pass, or one of them
            together with an adapter that puts something before the prompt.
    """
    mix = sequence.mix
    routed = [adapter for adapter, _ in mix.members if adapter.first_pass]
    if not routed:
        return
    if len(routed) > 1:
        names = ", ".join(adapter.name for adapter in routed)
        raise InvalidRequestError.of("adapters", say("SEVERAL_FIRST_PASSES", adapters=names))
    if sequence.num_virtual:
        said = say("FIRST_PASS_WITH_PREFIX", adapter=routed[0].name)
        raise InvalidRequestError.of("adapters", said)
    is_base = routed[0].first_pass == "base"
    own = mix.part([] if is_base else [(routed[0], 1.0)])
    sequence.first_pass = Sequence(sequence.request, own, sequence.arrival)
    # Share the token list, because generated tokens are also the next tokens of the first pass.
    sequence.first_pass.tokens = sequence.tokens


# The draft tokens of a step: which sequences get some, and the blocks for them.
#
# Draft tokens take the tokens and free blocks that a step has left (``server/engine/speculation``).
# No sequence waits or is preempted for them. The results for wrong draft tokens are overwritten,
# and blocks that hold nothing else are freed after the step.


class Drafts:
    """Adds draft tokens to steps.

    Attributes:
        is_paused: Whether no drafts are added, because the device had no memory for a step with
            drafts.

    Args:
        blocks: The KV blocks.
        speculation: Drafts for sequences that have a drafter; None for no drafts.
    """

    def __init__(self, blocks: BlockPool, speculation: Speculation | None) -> None:
        self.is_paused = False
        self._blocks = blocks
        self._speculation = speculation

    def add(self, scheduled: list[Scheduled], new_blocks: list[int], max_tokens: int) -> None:
        """Fill a step's remaining room with draft tokens.

        Args:
            scheduled: The items of the step; those that get a draft are replaced.
            new_blocks: Blocks that change owner with the step; those of drafts are added.
            max_tokens: Maximum number of tokens in the step.
        """
        if self._speculation is None or self.is_paused:
            return
        num_rows = sum(item.num_new for item in scheduled)
        plan = self._speculation.plan(num_rows)
        budget = max_tokens - num_rows
        for number, item in enumerate(scheduled):
            sequence, drafter = item.sequence, item.sequence.drafter
            if drafter is None or sequence.num_computed < sequence.prompt_end or not item.samples:
                continue
            places = (len(sequence.blocks) + self._blocks.num_free) * self._blocks.block_size
            most = min(budget, places - len(sequence.tokens))
            draft = self._speculation.draft(drafter, plan, most)
            if not draft:
                continue
            total = self._blocks.blocks_for(len(sequence.tokens) + len(draft))
            more = self._blocks.allocate(max(total - len(sequence.blocks), 0))
            assert more is not None, "there was room for all of it"
            sequence.blocks.extend(more)
            new_blocks.extend(more)
            scheduled[number] = replace(item, draft=draft)
            budget -= len(draft)

    def accepted(self, sequence: Sequence, count: int) -> None:
        """Learn how many tokens of a draft were right, and free the blocks of the others."""
        if sequence.drafter is not None:
            sequence.drafter.learn(count)
        self.take_back(sequence)

    def take_back(self, sequence: Sequence) -> None:
        """Free the blocks that hold only wrong draft tokens."""
        kept = self._blocks.blocks_for(len(sequence.tokens))
        if kept < len(sequence.blocks):
            self._blocks.release(sequence.blocks[kept:])
            sequence.blocks = sequence.blocks[:kept]

    def ended(self, sequence: Sequence) -> None:
        """Record that a sequence has run to its end."""
        if self._speculation is not None and sequence.drafter is not None:
            self._speculation.ended(sequence.drafter)


# Whether a sequence can be admitted without having to preempt one later.
#
# A prompt that fits now may no longer fit when other sequences have grown, and a preempted sequence
# must be computed again. So the scheduler looks ahead, like the Past-Future scheduler (arXiv
# 2507.10150). It assumes that every answer becomes as long as a recent one, and computes the memory
# at each end of a sequence to find the peak. A wrong forecast only causes a preemption, or leaves a
# place empty for a while.


# Number of answers from which the forecast is drawn: enough to show their spread, few enough to
# follow changes.
_WINDOW = 64


class LengthForecast:
    """Remembers the lengths of recent answers. Until one has ended, there is no forecast."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_WINDOW)
        # The seed is fixed so that runs can be repeated; its value does not matter.
        self._draw = random.Random(0)

    def ended(self, sequence: Sequence) -> None:
        """Learn from a sequence that ran to its end, whatever ended it."""
        if sequence.request.generates:
            self._lengths.append(sequence.num_generated)

    def tokens_left(self, sequence: Sequence) -> int:
        """The forecast number of tokens that a sequence will still generate.

        The forecast is drawn once, and again whenever the answer reaches it and continues.
        """
        if not sequence.request.generates:
            return 0
        so_far = sequence.num_generated
        if sequence.forecast <= so_far:
            longer = [length for length in self._lengths if length > so_far]
            sequence.forecast = self._draw.choice(longer) if longer else so_far
            if sequence.request.stop.max_tokens is not None:
                sequence.forecast = min(sequence.forecast, sequence.request.stop.max_tokens)
        return max(sequence.forecast - so_far, 0)

    def peak_tokens(self, sequences: Iterable[Sequence], block_size: int) -> int:
        """The maximum number of positions that these sequences will hold at once.

        Each sequence's unused positions count as half a block. The peak is just before the end of
        some sequence, when all that end later have grown by as many tokens. Returns 0 until an
        answer has ended.
        """
        if not self._lengths:
            return 0
        spans = sorted(((self.tokens_left(s), len(s.tokens)) for s in sequences), reverse=True)
        held = accumulate(tokens for _, tokens in spans)
        return max(
            (
                tokens + number * left + number * block_size // 2
                for number, ((left, _), tokens) in enumerate(zip(spans, held, strict=True), 1)
            ),
            default=0,
        )


# Share of the blocks that is kept free for answers longer than forecast.
_SPARE_SHARE = 0.05
# Smallest prompt chunk: smaller ones cost more per token than they save the decoding rows.
_LEAST_CHUNK = 16
# Chunks are limited if a tenant has at least this many decoding sequences per prompt. With fewer, a
# limit would delay a burst of the tenant's prompts by more than its decoding rows gain.
_MAJORITY = 4


class Scheduler:
    """Waiting and running sequences, and the blocks they hold.

    Attributes:
        base_generation: The generation of the base weights, which is part of every KV key. Set by
            ``change_base``.
        max_num_seqs: See below.
        is_draining: While True, running sequences (including preempted ones) run to their end and
            no others are admitted.

    Args:
        blocks: The KV blocks.
        max_num_seqs: Maximum number of sequences running at once.
        max_num_batched_tokens: Maximum number of tokens in a step.
        is_ready: Whether a waiting sequence's adapters are resident.
        fits: Whether a sequence's adapters fit in addition to those of the running sequences.
        preempt_after_seconds: How long a sequence waits before it takes another's place; None means
            forever.
        speculation: Drafts for sequences that have a drafter; None for no drafts.
        cost: The cost of a step's rows, which limits prompts while sequences decode; None for the
            limit ``most_beside``.
        most_beside: Maximum number of prompt tokens in a step in which mostly sequences decode.
        attention_span: The context at which a row's attention costs as much as the rest of the row
            (see ``Arch.attention_span``); infinite if prompts need not be limited by it.
    """

    def __init__(
        self,
        blocks: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_ready: Callable[[Sequence], bool] = lambda _: True,
        fits: Callable[[Sequence, list[Sequence]], bool] = lambda _s, _r: True,
        preempt_after_seconds: float | None = None,
        speculation: Speculation | None = None,
        cost: StepCost | None = None,
        most_beside: int | None = None,
        attention_span: float = math.inf,
    ) -> None:
        self.blocks = blocks
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []
        self.base_generation = 1
        self.is_draining = False
        self._lengths = LengthForecast()
        self._held = HeldBlocks(blocks)
        self._drafts = Drafts(blocks, speculation)
        self._cost = cost
        self._most_beside = max_num_batched_tokens if most_beside is None else most_beside
        self._attention_span = attention_span
        # The rows that prompts may still take in a step. A row with a long context counts as
        # several.
        self._room = math.inf
        self.max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        # Both limits drop below their maximum after a step that ran out of memory (see
        # ``abandon``).
        self._num_seqs = max_num_seqs
        self._num_tokens = max_num_batched_tokens
        self._is_ready = is_ready
        self._fits = fits
        self._preempt_after_seconds = preempt_after_seconds
        # The sequence that was next in the last step but did not fit.
        self._blocked: Sequence | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    @property
    def is_drained(self) -> bool:
        """Whether no unfinished sequence has begun, so that the base weights may change."""
        return not self.running and not any(s.num_preemptions for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence."""
        self.waiting.push(sequence)

    def change_base(self, generation: int) -> None:
        """Record that the base weights changed.

        The generation is part of every key, so blocks that were computed before are never found
        again.
        """
        assert self.is_drained, "a sequence is computed with one base"
        self.base_generation = generation
        for sequence in self.waiting:
            # A sequence that was considered before but did not fit already has its root key.
            for each in sequence.passes:
                each.keys.clear()

    def schedule(self, now: float = 0.0) -> Step:
        """Choose the next step's work and reserve its blocks.

        Args:
            now: Seconds on the clock of the sequences' ``arrival``.
        """
        num_yielded = self._make_room(now)
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            is_prompt = len(sequence.tokens) - sequence.num_computed > 1
            (prompts if is_prompt else decodes).append(sequence)
        budget = self._step_tokens(decodes, prompts)
        self._room = 2.0 * budget if decodes else math.inf
        scheduled: list[Scheduled] = []
        new_blocks: list[int] = []
        presets: list[tuple[Sequence, int]] = []
        num_preempted = 0
        shares = self._shares(prompts, budget - len(decodes))
        # Decodes before prompts, so that a long prompt never delays a token that is due.
        for sequence in decodes + prompts:
            if sequence.state is not SequenceState.RUNNING:
                continue
            is_prompt = len(sequence.tokens) - sequence.num_computed > 1
            share = shares.get(sequence.tenant, budget) if is_prompt else budget
            num_new = self._chunk(sequence, min(share, budget))
            if num_new == 0:
                continue
            if is_prompt and shares:
                shares[sequence.tenant] -= num_new
            while sequence.state is SequenceState.RUNNING:
                known = sequence.num_computed + num_new
                if self._held.reserve(sequence, known, new_blocks):
                    scheduled.append(Scheduled(sequence, num_new))
                    budget -= num_new
                    break
                victim = self.running[-1]
                num_preempted += 1
                for i, item in enumerate(scheduled):
                    if item.sequence is victim:
                        budget += item.num_new
                        del scheduled[i]
                        break
                self._preempt(victim, now)
        for item in scheduled:
            self.waiting.charge(item.sequence.group, item.num_new)
        if num_preempted == 0:
            self._admit(budget, scheduled, new_blocks, presets)
            self._drafts.add(scheduled, new_blocks, self._num_tokens)
        num_preempted += num_yielded
        return Step(tuple(scheduled), tuple(new_blocks), num_preempted, tuple(presets))

    def yield_memory(
        self, wanting: AbstractSet[Mix], since: Mapping[Sequence, float], now: float
    ) -> tuple[Sequence, list[Sequence]] | None:
        """Let a sequence that has waited long enough take the memory of other mixes' adapters.

        All sequences of a mix yield. Those that run are preempted. A mix keeps its memory for
        ``preempt_after_seconds``, so that mixes do not take turns in every step.

        Args:
            wanting: The mixes that wait for memory.
            since: The sequences that hold memory for their adapters, each with the time at which
                the adapters were ready.
            now: The current time, in seconds.

        Returns:
            The sequence that gets the memory, and those that yield; None if none must yield.
        """
        after, draining = self._preempt_after_seconds, self.is_draining
        to = self.waiting.peek(
            lambda s: (
                s.mix in wanting and (s.num_preemptions > 0 if draining else not s.mix.is_resident)
            )
        )
        if to is None or after is None or not (draining or now - to.waiting_since >= after):
            return None
        kept = {adapter.key for adapter, _ in to.mix.members}
        holding = [
            s for s in since if any(not a.pinned and a.key not in kept for a, _ in s.mix.members)
        ]
        if draining:
            # The base changes only once ``to`` has ended, and the others begin only after that.
            yielding = [
                s for s in holding if s.state is SequenceState.WAITING and s.num_preemptions == 0
            ]
            return (to, yielding) if yielding or to.mix.is_resident else None
        holding = [s for s in reversed(holding) if now - since[s] >= after]
        holding.sort(key=lambda s: self.waiting.num_running(s.group))
        first = self._yielding(to, holding)
        if first is None:
            return None
        yielding = [s for s in since if s.group == first.group]
        for sequence in yielding:
            if sequence.state is SequenceState.RUNNING:
                self._preempt(sequence, now)
        return to, yielding

    def complete(self, step: Step, seconds: float | None = None) -> None:
        """Record that a step was computed: its tokens' keys and values are in the cache.

        Args:
            step: The step as it was scheduled.
            seconds: The time of the step; the cost of rows is learned from steps that only decode.
        """
        # A sequence with a first pass computes two rows per token, which distorts a row's cost.
        if (
            self._cost is not None
            and seconds is not None
            and all(i.num_new == 1 and i.sequence.first_pass is None for i in step.scheduled)
        ):
            self._cost.took(sum(item.num_rows for item in step.scheduled), seconds)
        for item in step.scheduled:
            self._held.computed(item.sequence, item.num_new)

    def accept(self, item: Scheduled, count: int) -> None:
        """Record, after ``complete``, how many tokens of a draft were right.

        The right tokens are already part of the sequence, which continues after them or has ended
        there.
        """
        sequence = item.sequence
        self._held.computed(sequence, count)
        # Charge the tokens that were served; rejected drafts are free.
        self.waiting.charge(sequence.group, count)
        self._drafts.accepted(sequence, count)

    def abandon(self, step: Step, now: float = 0.0, *, is_too_large: bool = True) -> int | None:
        """Undo a step for which the device had no memory, so that nothing of it was computed.

        If a smaller step would help, the sequence that was admitted last is preempted, and later
        steps are smaller: half the tokens, and one sequence less. Every sequence that ends relaxes
        these limits.

        Args:
            step: The step.
            now: The current time, in seconds.
            is_too_large: Whether a smaller step would help.

        Returns:
            How many sequences were preempted; None if the step has a single sequence and cannot be
            smaller, so that the sequence cannot run.
        """
        for item in step.scheduled:
            self._drafts.take_back(item.sequence)
            # Refund before preempting: the same groups must be busy as when they were charged.
            self.waiting.charge(item.sequence.group, -item.num_new)
        sequences = [item.sequence for item in step.scheduled]
        tokens = sum(item.num_new for item in step.scheduled)
        victims = set[Sequence]()
        if is_too_large:
            is_least = len(sequences) == 1 and tokens <= self.max_num_seqs
            if is_least and not step.scheduled[0].draft:
                return None
            self._drafts.is_paused = True
            # Keep enough tokens for a decode step of all sequences.
            self._num_tokens = max(tokens // 2, self.max_num_seqs)
            self._num_seqs = max(len(self.running) - 1, 1)
            if len(sequences) > 1:
                victims.add(max(sequences, key=self.running.index))
        if step.presets:
            # The keys of their prefix blocks are already registered, but the blocks may not have
            # been filled.
            self.blocks.forget_cached()
            victims |= {sequence for sequence in sequences if sequence.num_preset}
        # Push back the latest first, so that the sequence admitted first is at the head again.
        for sequence in sorted(victims, key=self.running.index, reverse=True):
            self._preempt(sequence, now)
        return len(victims)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence in any state, and free its blocks. Idempotent."""
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.waiting.stop(sequence)
            self._lengths.ended(sequence)
            self._drafts.ended(sequence)
        else:
            self.waiting.remove(sequence)
        self._held.free(sequence)
        sequence.state = SequenceState.FINISHED
        self._drafts.is_paused = False
        self._num_seqs = min(self._num_seqs + 1, self.max_num_seqs)
        self._num_tokens = min(2 * self._num_tokens, self._max_num_batched_tokens)

    def _step_tokens(self, decodes: list[Sequence], prompts: list[Sequence]) -> int:
        """Maximum number of tokens in the next step: fewer if it decodes and reads prompts.

        On compute paths where a row of a prompt costs as much as a decode row, prompts must not
        slow down decoding too much. If at least four times as many sequences of some tenant decode
        as read their prompts or could begin to, the prompt tokens of a step are limited. The limit
        is the number that doubles the time of the step, but at least 16. On a GPU, where a step
        with a prompt has a high fixed cost, the limit is a constant. If more tenants read prompts
        than have such a majority of decoding sequences, the limit is multiplied by the ratio of
        these two numbers, so that the tenants share the time.
        """
        num_decodes = len(decodes)
        num_free = max(self._num_seqs - len(self.running), 0)
        reading = Counter([sequence.tenant for sequence in prompts])
        num_delayed = 0
        for tenant, count in Counter([sequence.tenant for sequence in decodes]).items():
            admissible = min(self.waiting.num_waiting(tenant), num_free)
            num_delayed += count >= _MAJORITY * (reading[tenant] + admissible)
        if num_delayed == 0:
            return self._num_tokens
        beside = self._most_beside
        if self._cost is not None:
            beside = max(_LEAST_CHUNK, num_decodes + int(self._cost.fixed_rows))
        beside = beside * max(len(reading), num_delayed) // num_delayed
        return min(self._num_tokens, num_decodes + beside)

    def _shares(self, prompts: list[Sequence], left: int) -> dict[bytes, int]:
        """The maximum number of tokens of running prompts in the next step, by tenant.

        Tenants share what decoding rows leave of a step, including the tenant of the next sequence
        in line. Otherwise, that sequence would wait until a long prompt has been read. Without
        other tenants there is no limit.

        Args:
            prompts: The running prompts.
            left: The tokens that decoding rows leave.
        """
        if not prompts:
            return {}
        tenants = {sequence.tenant for sequence in prompts}
        if len(self.running) < self._num_seqs:
            waiting = self.waiting.peek(self._may_start)
            # A sequence that did not fit into the last step would leave its share unused.
            if waiting is not None and waiting is not self._blocked:
                tenants.add(waiting.tenant)
        if len(tenants) == 1:
            return {}
        return dict.fromkeys(tenants, max(left // len(tenants), 1))

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a sequence a step takes: fewer of a prompt far into its context.

        Attention makes a row more expensive the longer its context is. So while other sequences
        decode, the prompt tokens of a step may cost at most twice as much as a full step without
        attention.
        """
        chunk = min(sequence.num_alike, budget)
        if chunk == 0 or len(sequence.tokens) - sequence.num_computed == 1:
            return chunk
        weight = 1.0 + sequence.num_computed / self._attention_span
        # Take at least one token, so that a prompt always advances.
        chunk = max(int(min(self._room / weight, chunk)), 1) if self._room > 0 else 0
        self._room -= chunk * weight
        return chunk

    def _make_room(self, now: float) -> int:
        """Take a place for a sequence that has waited long enough; returns how many were taken."""
        after = self._preempt_after_seconds
        if after is None or self.is_draining or not len(self.waiting):
            return 0
        is_full = len(self.running) >= self._num_seqs
        blocked = self.waiting.peek(self._may_start) if is_full else self._blocked
        if (
            blocked is None
            or blocked.state is not SequenceState.WAITING
            or now - blocked.waiting_since < after
        ):
            return 0
        # The latest sequence recomputes the least.
        yielding = self._yielding(blocked, self.running[::-1])
        if yielding is None:
            return 0
        self._preempt(yielding, now)
        return 1

    def _yielding(self, waiting: Sequence, holding: SequenceOf[Sequence]) -> Sequence | None:
        """The sequence that yields what it holds; the first of several equal ones, or None."""
        places = Counter(sequence.tenant for sequence in holding)
        held = Counter(sequence.group for sequence in holding)
        own, served = places[waiting.tenant], self.waiting.served
        most = max(holding, key=lambda s: places[s.tenant], default=None)
        if most is not None and waiting.tenant and places[most.tenant] > own + 1:
            return most
        # A sequence may yield only if its mix holds more places than that of the waiting sequence.
        # If its tenant is another one, the same applies to the tenants.
        richer = [
            s
            for s in holding
            if held[s.group] > held[waiting.group]
            and (s.tenant == waiting.tenant or places[s.tenant] > own)
        ]
        most = max(richer, key=lambda s: served(s.group), default=None)
        if most is None or served(most.group) <= served(waiting.group):
            return None
        return most

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self.running.remove(sequence)
        self.waiting.stop(sequence)
        self._held.free(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        sequence.waiting_since = now
        self.waiting.push_front(sequence)

    def _admit(
        self,
        budget: int,
        scheduled: list[Scheduled],
        new_blocks: list[int],
        presets: list[tuple[Sequence, int]],
    ) -> None:
        self._blocked = None
        while budget > 0 and self._room > 0 and len(self.running) < self._num_seqs:
            sequence = self.waiting.peek(self._may_start)
            # A sequence that does not fit in addition to the running ones blocks those behind it,
            # because passing it over could starve it.
            if sequence is None or not self._fits(sequence, self.running):
                self._blocked = sequence
                return
            self._find_prefix(sequence)
            # Require room for all tokens known so far, not only the first chunk: a sequence that
            # cannot finish its prompt would only preempt another.
            missing = self._held.missing(sequence, len(sequence.tokens))
            if missing > self.blocks.num_free or self._will_run_out(sequence):
                self._held.free(sequence)
                self._blocked = sequence
                return
            self._preset(sequence, new_blocks, presets)
            num_new = self._chunk(sequence, budget)
            known = sequence.num_computed + num_new
            reserved = self._held.reserve(sequence, known, new_blocks)
            assert reserved, "there was room for all of it"
            # Start before remove: the queue forgets a group that neither waits nor runs.
            self.waiting.start(sequence)
            self.waiting.remove(sequence)
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            scheduled.append(Scheduled(sequence, num_new))
            # Charge at once, because the charge may make another group the next in turn.
            self.waiting.charge(sequence.group, num_new)
            budget -= num_new

    def _will_run_out(self, sequence: Sequence) -> bool:
        """Whether blocks would probably run out later, were it admitted now."""
        if not self.running:
            return False
        together = [*self.running, sequence]
        # A sequence with a first pass fills twice the blocks.
        passes = [sequence for sequence in together for _ in sequence.passes]
        peak = self._lengths.peak_tokens(passes, self.blocks.block_size)
        repeated = self._held.num_repeated(together)
        most = (1 - _SPARE_SHARE) * (self.blocks.num_blocks - 1)
        return self.blocks.blocks_for(peak) - repeated > most

    def _may_start(self, sequence: Sequence) -> bool:
        has_begun = sequence.num_preemptions > 0
        return self._is_ready(sequence) and (has_begun or not self.is_draining)

    def _find_prefix(self, sequence: Sequence) -> None:
        size = self.blocks.block_size
        # The last token is always computed, because its logits are needed.
        usable = (len(sequence.tokens) - 1) // size
        if sequence.request.needs_every_position:
            # Cached positions are not computed, so they have no logits and no states.
            usable = sequence.num_preset // size
        self._held.find(sequence, usable, self.base_generation)
        if sequence.num_preemptions == 0:
            cached = min(sequence.num_computed, sequence.prompt_end) - sequence.num_virtual
            sequence.num_cached = max(cached, 0)

    def _preset(
        self,
        sequence: Sequence,
        new_blocks: list[int],
        presets: list[tuple[Sequence, int]],
    ) -> None:
        """Reserve prefix blocks that no other request of the adapter holds."""
        size = self.blocks.block_size
        start, count = len(sequence.blocks), sequence.num_preset // size
        if start >= count:
            return
        fresh = self.blocks.allocate(count - start)
        assert fresh is not None, "there was room for all of it"
        sequence.blocks.extend(fresh)
        new_blocks.extend(fresh)
        presets.append((sequence, start))
        for index in range(start, count):
            # Register at once: the step fills these blocks before anything reads them.
            self.blocks.register(sequence.blocks[index], sequence.keys[index + 1])
        sequence.num_computed = sequence.num_preset
