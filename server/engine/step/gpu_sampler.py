"""Draws the tokens of a step on the device, all rows at once, with one wait.

The sampling kernel is part of the step's launches, so a captured step also draws tokens. Its
parameters are sent with the step's tables. The kernel does not support penalties, biases, bans and
masks. If a row has any, the logits are changed and the step's tokens are drawn again; the host
still waits only once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

from turret.kernels.gpu.sample_rows import sample_rows
from turret.kernels.gpu.tables import SamplingTable, has_streams, upload
from turret.kernels.likeliest import apply_token_mask
from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step import NOTHING_ADDED
from turret.server.engine.step.sampler import (
    NO_MASKS,
    NOTHING_DRAWN,
    Adjustment,
    Draw,
    Mask,
    Sampler,
    TokenMask,
    masked_rows,
)

_HOST = torch.device("cpu")
# Larger numbers are not exact in fp32, and no vocabulary has as many tokens.
_MAX_TOP_K = 1 << 24
# Temperature, top-p, maximum distance from the likeliest token (min-p) and top-k, in the format of
# ``SamplingTable``.
_Row = tuple[float, float, float, float]


class GpuSampler(Sampler):
    """Draws on the device.

    The tokens of sequences with a vocabulary of their own are drawn on the host.

    Args:
        stop_token_ids: The model's end tokens, which are not drawn before ``min_tokens``.
        max_seqs: Maximum number of sequences in a step.
        device: Where the logits are.
    """

    # Masks are computed while the device computes. A late mask would require another wait for the
    # device.
    takes_late_masks = False

    def __init__(self, stop_token_ids: frozenset[int], max_seqs: int, device: torch.device) -> None:
        super().__init__(stop_token_ids)
        self._rows: dict[Sequence, _Row] = {}
        self._table: SamplingTable | None = None
        self._tokens = torch.zeros(max_seqs, dtype=torch.int64, device=device)
        self._pin = device.type == "cuda"
        self._host = torch.zeros(max_seqs, dtype=torch.int64, pin_memory=self._pin)
        self._read = torch.cuda.Event() if has_streams(device) else None

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._rows.pop(sequence, None)

    def load(self, numbers: SequenceOf[float], table: SamplingTable) -> None:
        """Copy the sampling parameters of a step's rows into its table.

        Args:
            numbers: The result of ``numbers``, in the order of the step's logits.
            table: The table of the step; ``draw`` uses it until the next ``load``.
        """
        self._table = table
        table.load(numbers)

    def numbers(self, sequences: SequenceOf[Sequence], ahead: int = 0) -> list[float]:
        """The sampling parameters of these sequences' rows, in the format of ``SamplingTable``.

        Args:
            sequences: The sequences that sample.
            ahead: The number of tokens that each sequence will get before this step.
        """
        numbers: list[float] = []
        for sequence in sequences:
            row = self._rows.get(sequence)
            if row is None:
                row = self._rows[sequence] = _row(sequence.request.sampling)
            is_greedy = sequence.request.sampling.is_greedy
            numbers.append(0.0 if is_greedy else self._uniform(sequence, ahead))
            numbers += row
        return numbers

    def launch(self, logits: torch.Tensor, table: SamplingTable) -> None:
        """Start drawing a token from every row of ``logits``, ``[rows, vocab]`` fp32."""
        sample_rows(logits, table.buffer, self._tokens)

    def draw(
        self,
        logits: torch.Tensor,
        sequences: SequenceOf[Sequence],
        masks: Mapping[Sequence, Mask] = NO_MASKS,
        drawn: Mapping[Sequence, SequenceOf[int]] = NOTHING_DRAWN,
        added: Mapping[Sequence, torch.Tensor] = NOTHING_ADDED,
    ) -> list[Draw]:
        """Wait for the device and return what was drawn; ``launch`` was part of the step.

        Args:
            logits: ``[rows, vocab]`` fp32; modified in place.
            sequences: The sequence of each row, in the order in which they were loaded.
            masks: The masks of the sequences with a constraint.
            drawn: Always empty, because steps on a GPU have no drafts.
            added: Logits of tokens beyond ``vocab``, ``[tokens]`` fp32, of sequences that have any.
        """
        assert not drawn, "a row has been drawn already, as a part of the step"
        top_n = [s.request.options.top_n for s in sequences if s.request.options.logprobs]
        # Logprobs are taken before any sampling parameter changes the logits.
        logprobs = logits.log_softmax(-1) if top_n else None
        is_changed = self._change(logits, sequences)
        if (masked := masked_rows(sequences, masks)) is not None:
            apply_token_mask(logits, *(upload(part, logits.device) for part in masked))
        if is_changed or masked is not None:
            assert self._table is not None, "its step has loaded it"
            self.launch(logits, self._table)
        tokens = self._tokens[: len(sequences)]
        reports: tuple[torch.Tensor, ...] = ()
        if logprobs is not None:
            values, ids = logprobs.topk(min(max(top_n), logprobs.shape[1]), dim=-1)
            reports = (logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), values, ids)
        found, *reported = self._to_host(tokens, *reports)
        draws = [Draw(token) for token in found.tolist()]
        if reported:
            chosen, values, ids = (part.tolist() for part in reported)
            draws = [
                _reported(sequence, token, chosen[i], list(zip(ids[i], values[i], strict=True)))
                for i, (sequence, token) in enumerate(zip(sequences, found.tolist(), strict=True))
            ]
        for i, sequence in enumerate(sequences):
            mask = masks.get(sequence)
            if isinstance(mask, TokenMask) and mask.error is not None:
                draws[i] = Draw(-1, error=mask.error)
            elif sequence.vocab_size:
                beyond = {s: rows.cpu() for s, rows in added.items() if s is sequence}
                row = logits[i : i + 1].cpu()
                draws[i] = super().draw(row, [sequence], masks, added=beyond)[0]
        return draws

    def _to_host(self, tokens: torch.Tensor, *reports: torch.Tensor) -> list[torch.Tensor]:
        """Copy results to the host. This is the step's only wait."""
        if self._read is None:
            return [tokens, *reports]
        targets = [self._host[: len(tokens)]]
        targets += [torch.empty(r.shape, dtype=r.dtype, pin_memory=self._pin) for r in reports]
        for target, source in zip(targets, (tokens, *reports), strict=True):
            target.copy_(source, non_blocking=True)
        self._read.record(torch.cuda.current_stream())
        self._read.synchronize()
        return targets

    def _change(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> bool:
        """Change the logits as the requests ask, in place; returns whether anything changed.

        The order is that of ``Adjustment``. Each kind of change is one operation for all rows, on
        flat indices into ``logits`` that no two rows share.
        """
        rows = [(i, s) for i, s in enumerate(sequences) if _is_adjusted(s)]
        if not rows:
            return False
        changes = _Changes(logits.shape[1])
        for i, sequence in rows:
            # The adjustment's tensors stay on the host, where new tokens are read. All changes are
            # copied together.
            changes.add(i, self._adjustment(sequence, _HOST))
        changes.apply(logits)
        return True


class _Changes:
    """Changes of a step's logits, collected on the host.

    Args:
        vocab: Number of logits of a row.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        # Indices and numbers of the changes, by kind, in the order in which they are applied.
        self._places: list[list[torch.Tensor]] = [[] for _ in range(4)]
        self._numbers: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def add(self, row: int, adjustment: Adjustment) -> None:
        """Collect the changes that a row's request asks for."""
        for ids, factor in adjustment.factors():
            self._put(0, row, ids, torch.full(ids.shape, factor))
        for ids, amounts in adjustment.penalties():
            self._put(1, row, ids, amounts)
        for ids, amounts in adjustment.biases():
            self._put(2, row, ids, amounts)
        for ids in adjustment.bans():
            self._put(3, row, ids, torch.zeros(ids.shape))

    def _put(self, kind: int, row: int, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        self._places[kind].append(ids + row * self._vocab)
        self._numbers[kind].append(numbers)

    def apply(self, logits: torch.Tensor) -> None:
        """Change ``[rows, vocab]`` fp32 logits in place.

        This takes two copies to the device, however many rows there are.
        """
        sizes = [sum(map(len, places)) for places in self._places]
        if not any(sizes):
            return
        places = [part for kind in self._places for part in kind]
        numbers = [part for kind in self._numbers for part in kind]
        where = upload(torch.cat(places), logits.device).split(sizes)
        what = upload(torch.cat(numbers), logits.device).split(sizes)
        flat = logits.view(-1)
        if sizes[0]:
            values = flat.index_select(0, where[0])
            shrunk = torch.where(values > 0, values / what[0], values * what[0])
            flat.index_copy_(0, where[0], shrunk)
        if sizes[1]:
            flat.index_add_(0, where[1], what[1], alpha=-1.0)
        if sizes[2]:
            flat.index_add_(0, where[2], what[2])
        if sizes[3]:
            flat.index_fill_(0, where[3], float("-inf"))


def _row(params: SamplingParams) -> _Row:
    """The sampling parameters of a request's rows."""
    # Avoid -0, whose bits are not a valid distance.
    distance = 0.0 - math.log(params.min_p) if params.min_p > 0.0 else math.inf
    top_k = float(min(params.top_k, _MAX_TOP_K))
    return params.temperature, params.top_p, distance, top_k


def _is_adjusted(sequence: Sequence) -> bool:
    params, stop = sequence.request.sampling, sequence.request.stop
    return not sequence.vocab_size and bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or sequence.num_generated < stop.min_tokens
    )


def _reported(sequence: Sequence, token: int, logprob: float, top: list[tuple[int, float]]) -> Draw:
    options = sequence.request.options
    if not options.logprobs:
        return Draw(token)
    return Draw(token, logprob, tuple(top[: options.top_n]))
