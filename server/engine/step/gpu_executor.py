"""The gpu path: steps as Triton kernels, decode steps as CUDA graphs.

All metadata of a step goes to the device in a few asynchronous copies before its first kernel;
nothing waits for the device until the sampler reads the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.gpu.store import GpuAdapterStep, GpuStore
from turret.server.adapters.device.gpu.streams import UploadTurns
from turret.server.engine.scheduling.scheduler import Scheduled, Step
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.batch import members_of
from turret.server.engine.step.decode_graphs import Capture, DecodeGraphs, buckets
from turret.server.engine.step.executor import Computed, fill_prefix, sampled_rows
from turret.server.engine.step.gpu_tables import StepTables
from turret.server.engine.step.rows import Placed, collect_rows
from turret.server.engine.step.vocabulary_plan import changed_embeddings, changed_heads
from turret.server.models.decoding.gpu_decoder import GpuDecoder, GpuStep
from turret.server.models.decoding.kv_cache import KvCache


class GpuExecutor:
    """Computes steps on the gpu path.

    Args:
        decoder: The model.
        cache: Its KV cache. Blocks are not cleared when they change owner: the kernels read no
            position that was not written.
        store: The adapters.
        max_num_seqs: Sequences of a step at most.
        max_num_batched_tokens: Rows of a step at most.
        capture: Captures decode steps, or None to launch every kernel of every step.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        cache: KvCache,
        store: GpuStore,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        capture: Capture | None,
    ) -> None:
        self.store: GpuStore = store
        self._decoder = decoder
        self._cache = cache
        self._buckets = buckets(max_num_seqs)
        self._graphs = DecodeGraphs(capture)
        self._turns = UploadTurns(decoder.device)

        def tables(max_rows: int) -> StepTables:
            return StepTables(
                decoder.arch,
                max_rows=max_rows,
                max_seqs=max_num_seqs,
                max_len=decoder.arch.max_model_len,
                block_size=cache.block_size,
                device=decoder.device,
            )

        self._decode, self._mixed = tables(max_num_seqs), tables(max_num_batched_tokens)
        self._every_row = torch.arange(max_num_seqs, device=decoder.device)

    def run(self, step: Step) -> Computed:
        """Compute a step. Keys and values of its tokens are in the cache afterwards."""
        for sequence, start in step.presets:
            fill_prefix(self._cache, sequence, start)
        # Rows of sequences that generate come first (see ``models/nf4_gpu.py``).
        order = sorted(step.scheduled, key=lambda item: not _generates(item))
        placed, row = [], 0
        for item in order:
            placed.append(Placed(item, row))
            row += item.num_new
        num_decode = sum(item.num_new for item in order if _generates(item))
        samples = [place.last_row for place in placed if place.samples]
        if num_decode == row == len(samples):
            hidden, logits = self._run_decode(placed)
        else:
            inputs = self._load(self._mixed, placed, num_decode, row, samples)
            hidden, logits = self._decoder.compute(inputs, self._cache)
        return Computed(tuple(placed), hidden, logits[: len(samples)] if samples else None)

    def logits(self, sequence: Sequence, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states of one sequence, ``[rows, hidden]`` → ``[rows, vocab]`` fp32."""
        rows = [(sequence, range(hidden.shape[0]))]
        return self._decoder.logits(hidden, changed_heads(rows, self.store, hidden.device))

    def free_memory(self) -> None:
        """Give back captured steps and what torch's allocator holds."""
        self._graphs.drop()
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_decode(self, placed: SequenceOf[Placed]) -> tuple[torch.Tensor, torch.Tensor]:
        """One new token of every sequence: padded to a bucket, captured if it can be."""
        tables = self._decode
        bucket = next(size for size in self._buckets if size >= len(placed))
        inputs = self._load(tables, placed, bucket, bucket, None)
        if not inputs.is_fixed:
            return self._decoder.compute(inputs, self._cache)
        adapters = None if inputs.adapters is None else inputs.adapters.signature
        return self._graphs.run(
            (self.store.epoch, tables.epoch, self._decoder.epoch),
            (bucket, adapters),
            lambda: self._decoder.compute(inputs, self._cache),
        )

    def _load(
        self,
        tables: StepTables,
        placed: SequenceOf[Placed],
        num_decode: int,
        num_rows: int,
        samples: list[int] | None,
    ) -> GpuStep:
        """Start copying a step's metadata; ``samples`` None stands for every row."""
        self._turns.begin()
        rows = collect_rows(placed, self._cache.block_size)
        ids, places, slots, sample_rows = tables.load_rows(
            rows.token_ids, rows.positions, rows.kv_slots, samples or ()
        )
        adapters = self._adapters(tables, placed)
        its_rows = [(p.item.sequence, range(p.row_start, p.last_row + 1)) for p in placed]
        attention = tables.load_attention(rows.spans)
        self._turns.end()
        device = self._decoder.device
        return GpuStep(
            token_ids=ids[:num_rows],
            positions=places[:num_rows],
            kv_slots=slots[:num_rows],
            sample_rows=self._every_row[:num_rows]
            if samples is None
            else sample_rows[: len(samples)],
            num_decode=num_decode,
            attention=attention,
            adapters=adapters,
            soft_rows=upload(torch.tensor(rows.soft_rows), device) if rows.soft_rows else None,
            soft_values=upload(torch.cat(rows.soft_values), device) if rows.soft_rows else None,
            embeddings=changed_embeddings(its_rows, self.store, device),
            heads=changed_heads(sampled_rows(placed), self.store, device),
        )

    def _adapters(self, tables: StepTables, placed: SequenceOf[Placed]) -> GpuAdapterStep | None:
        mixes = [place.item.sequence.mix for place in placed]
        adapters = {a.key: a for mix in mixes for a, _ in mix.members}
        if not adapters:
            return None
        self.store.prepare(adapters.values())
        runs = [
            (place.row_start, place.last_row + 1, members_of(place.item.sequence))
            for place in placed
        ]
        return self.store.bind(runs, tables)


def _generates(item: Scheduled) -> bool:
    return item.sequence.num_computed >= item.sequence.prompt_end
