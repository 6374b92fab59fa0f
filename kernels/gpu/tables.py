"""Tables on the device that change with every step: at fixed addresses, filled by few copies.

``StagedMemory`` holds ``RowTable``, ``SamplingTable``, ``SegmentTable`` (with the gates) and
``AttentionTable``. The comment above each of these classes shows the layout of its table.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from turret.kernels.paged_attention import SequenceSpan

# The adapters of a step are stored side by side in a pack: adapter ``k`` owns the ranks
# ``[lo_k, hi_k)`` of every packed matrix. Segments define which rows use which adapters.


@dataclass(frozen=True, slots=True)
class SegmentMember:
    """One adapter of a mix: its ranks in the pack, its slot and its weight."""

    rank_start: int
    rank_end: int
    slot: int
    weight: float


@dataclass(frozen=True, slots=True)
class GatedMembers:
    """Members that are the components of one gated adapter.

    Attributes:
        begin: Position of the first member in the segment's members.
        end: Position after the last member. All members share a slot.
        query_length: Length of the adapter's longest query.
    """

    begin: int
    end: int
    query_length: int


@dataclass(frozen=True, slots=True)
class RunOfRows:
    """Rows ``[start, end)``, one or more, that share one mix.

    ``gated`` lists the gated adapters among the members; equal mixes have equal lists.
    """

    start: int
    end: int
    members: tuple[SegmentMember, ...]
    gated: tuple[GatedMembers, ...] = ()


# Parts of the memory begin at multiples of this, so that kernels can read wide words.
_ALIGNMENT = 256
_CHUNK_BYTES = 1 << 18
# Loaded parts are copied together if no gap between them is larger than this.
_MAX_GAP_BYTES = 1 << 16


def has_streams(device: torch.device) -> bool:
    """Whether a device runs work asynchronously, on streams."""
    return device.type == "cuda"


_CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f"}


def host_tensor(values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the values on the host, ``[len(values)]`` int32, int64 or fp32.

    A step makes many such tensors, and ``torch.tensor`` would take several times as long.
    """
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(array(_CODES[dtype], values), dtype=dtype)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start copying a host tensor to the device.

    Torch's host allocator keeps the pinned copy that the transfer reads until the transfer ends.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class _Chunk:
    """Device memory, and two staging areas of the same layout in pinned memory.

    Attributes:
        used: The number of bytes in parts.
        loaded: The ranges of bytes that the current step has written.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.staging = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        ]
        self.used = 0
        self.loaded: list[tuple[int, int]] = []

    def send(self, half: int) -> int:
        """Start copying the loaded parts; gaps between them are copied too, but never read.

        Returns:
            The number of copies.
        """
        runs: list[list[int]] = []
        for begin, end in sorted(self.loaded):
            if runs and begin - runs[-1][1] <= _MAX_GAP_BYTES:
                runs[-1][1] = max(runs[-1][1], end)
            else:
                runs.append([begin, end])
        for begin, end in runs:
            self.memory[begin:end].copy_(self.staging[half][begin:end], non_blocking=True)
        self.loaded.clear()
        return len(runs)


class StagedMemory:
    """Device buffers with fixed addresses that a step fills together, usually by one copy.

    A step calls ``begin``, loads parts, and calls ``send``. There are two staging areas, so that
    the next step can be prepared while this one's copy is under way; ``begin`` waits for the copy
    of the step before the last, which read the same area. A part holds valid values only if it
    was loaded by the last step that loaded any part of the same memory.

    Not thread-safe.

    Args:
        device: The device of the buffers.
        chunk_bytes: The minimum size of an allocation, which parts share.

    Attributes:
        num_copies: The number of copies started so far.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self.num_copies = 0
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._chunks: list[_Chunk] = []
        self._half = 0
        self._is_open = False
        self._events = [torch.cuda.Event() for _ in range(2)] if has_streams(device) else []

    def part(self, count: int, dtype: torch.dtype) -> StagedPart:
        """Reserve a buffer of ``count`` elements. Its address never changes."""
        size = count * dtype.itemsize
        chunk = next((c for c in self._chunks if c.used + size <= c.memory.numel()), None)
        if chunk is None:
            chunk = _Chunk(max(size, self._chunk_bytes), self._device)
            self._chunks.append(chunk)
        begin = chunk.used
        chunk.used = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
        return StagedPart(self, chunk, begin, count, dtype)

    def begin(self) -> None:
        """Begin a step, after waiting until its staging area has been copied."""
        self._half = 1 - self._half
        # Query first: waiting for an event, even for one that is long over, would release the GIL
        # just before the launches.
        if self._events and not self._events[self._half].query():
            self._events[self._half].synchronize()
        self._is_open = True

    def staging_of(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        """The one of two staging areas to which the open step writes."""
        assert self._is_open, "outside a step the device may be reading it"
        return halves[self._half]

    def send(self) -> None:
        """Start the step's copies, on the current stream."""
        for chunk in self._chunks:
            self.num_copies += chunk.send(self._half)
        if self._events:
            self._events[self._half].record(torch.cuda.current_stream())
        self._is_open = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the block between ``begin`` and ``send``, or within the open step if there is one."""
        if self._is_open:
            yield
            return
        self.begin()
        try:
            yield
        finally:
            self.send()


class StagedPart:
    """A buffer in a ``StagedMemory``.

    Attributes:
        buffer: ``[count]`` on the device; its address never changes.
    """

    def __init__(
        self, memory: StagedMemory, chunk: _Chunk, begin: int, count: int, dtype: torch.dtype
    ) -> None:
        self._memory = memory
        self._chunk = chunk
        self._begin = begin
        self._item_bytes = dtype.itemsize
        where = slice(begin, begin + count * dtype.itemsize)
        self.buffer = chunk.memory[where].view(dtype)
        self._staging = [staging[where].view(dtype) for staging in chunk.staging]

    def load(self, words: Sequence[int]) -> None:
        """Write to the front of the buffer; all other elements become undefined.

        The copy starts with the step's ``send``, or at once if no step is open.

        Raises:
            ValueError: There are more words than the buffer has elements.
        """
        size = len(words)
        with self._memory.step():
            self.staged(size).copy_(host_tensor(words, self.buffer.dtype))

    def staged(self, size: int) -> torch.Tensor:
        """The front of this buffer's staging area in the open step, to which the caller writes.

        Raises:
            ValueError: ``size`` exceeds the number of the buffer's elements.
        """
        if size > self.buffer.numel():
            raise ValueError(f"the step needs {size} words; {self.buffer.numel()} are allocated")
        self._chunk.loaded.append((self._begin, self._begin + size * self._item_bytes))
        return self._memory.staging_of(self._staging)[:size]


# Rows that use slot tables (Hadamard, Kronecker, experts), in an int32 buffer on the device.
#
# A captured CUDA graph replays with any later step, because kernels read the count from here::
#
#     count · 0 · 0 · 0 | rows [capacity] | slots [capacity] | weights [capacity] (fp32 bits)

ROW_HEADER = 4
# Capacities should be multiples of this: the compiler specialises on whether 16 divides them.
ROW_TABLE_MULTIPLE = 16


class RowTable:
    """The rows of a step that use slot tables. Owns its device memory; not thread-safe.

    Attributes:
        buffer: ``[ROW_HEADER + 3 · capacity]`` int32 on the device; its address never changes.
        capacity: The maximum number of rows.
    """

    def __init__(
        self, capacity: int, device: torch.device, memory: StagedMemory | None = None
    ) -> None:
        """Allocate, inside ``memory`` if it is given."""
        self.capacity = capacity
        memory = StagedMemory(device, 0) if memory is None else memory
        self._part = memory.part(ROW_HEADER + 3 * capacity, torch.int32)
        self.buffer = self._part.buffer

    def load(self, rows: Sequence[int], slots: Sequence[int], weights: Sequence[float]) -> None:
        """Set the step's rows (each at most once), their slots and mix weights.

        Raises:
            ValueError: There are more rows than the capacity, or the lengths differ.
        """
        if not len(rows) == len(slots) == len(weights) <= self.capacity:
            raise ValueError(
                f"{len(rows)} rows, {len(slots)} slots, {len(weights)} weights; "
                f"{self.capacity} rows are allocated"
            )
        padding = [0] * (self.capacity - len(rows))
        bits = struct.unpack(f"<{len(rows)}i", struct.pack(f"<{len(rows)}f", *weights))
        header = (len(rows), 0, 0, 0)
        self._part.load((*header, *rows, *padding, *slots, *padding, *bits))


# Sampling parameters of each row on the device, in one buffer of fixed address::
#
#     row   uniform · temperature · top_p · max_distance · top_k · 0 · 0 · 0        (all fp32)

ROW = 8


class SamplingTable:
    """The sampling parameters of a step's rows. Owns its device memory; not thread-safe.

    Attributes:
        buffer: ``[max_rows, ROW]`` fp32 on the device; its address never changes.
    """

    def __init__(
        self, max_rows: int, device: torch.device, memory: StagedMemory | None = None
    ) -> None:
        """Allocate, inside ``memory`` if it is given."""
        memory = StagedMemory(device, 0) if memory is None else memory
        self._memory = memory
        self._part = memory.part(max_rows * ROW, torch.float32)
        self.buffer = self._part.buffer.view(max_rows, ROW)

    def load(self, numbers: Sequence[float]) -> None:
        """Set the sampling parameters of the first rows; all other rows are greedy.

        Args:
            numbers: Five numbers per row, one row after the other: a uniform number in [0, 1), the
                temperature (0: greedy), top-p (1: off), the maximum distance of a token from the
                likeliest in scaled logits (infinity: off), top-k (0: off).

        Raises:
            ValueError: There are more rows than the buffer has.
        """
        rows = host_tensor(numbers, torch.float32).view(len(numbers) // 5, 5)
        if len(rows) > len(self.buffer):
            raise ValueError(f"{len(rows)} rows are drawn; {len(self.buffer)} are allocated")
        with self._memory.step():
            staged = self._part.staged(self.buffer.numel()).view(-1, ROW)
            staged.zero_()
            staged[: len(rows), :5] = rows


# Segment metadata on the device: which rows of a step use which adapters.
#
# All tables are in one int32 buffer, whose header contains the positions of the sub-tables (``@``
# marks a position). A step therefore copies only the bytes that it uses, and kernels need one
# pointer. A captured CUDA graph replays with any later step, because kernels loop over the number
# of work units in the header.
#
# A *segment* is all rows that share a mix, in any order and wherever they are in the step (rows are
# gathered through ``rows``): decode requests of one adapter are one segment and read its weights
# once. Rows of the base model are segments without components. Segments are cut into *chunks* of at
# most ``TILE_ROWS`` rows; expand works per chunk. Chunks are cut into *items*, one per component
# and ``RANK_TILE`` ranks; shrink works per item::
#
#     header   num_rows · rows@ · components@ · 0 | num_chunks · chunks@ · num_items · items@
#              | num_gates · gates@ · num_query_items · query_items@
#     rows     row number …
#     component  rank_start · rank_end · slot · offset · weight (fp32 bits) · is_gated · 0 · 0
#     chunk      position · count · component_begin · component_end · v_base · v_stride · 0 · 0
#     item       position · count · rank · rank_end · slot · v_base · v_stride · rank_in_adapter
#
# Rank activations are stored compactly: row ``i`` of a chunk has its ``v_stride`` ranks (all
# components of the mix side by side, component ``c`` from ``offset_c``) at ``v_base + i ·
# v_stride``.
#
# If a mix contains the components of a gated adapter, each of its chunks also has a *gate*, which
# lists them, and *query items*, each of ``RANK_TILE`` of the query's vectors. The products of a row
# with these vectors are stored like its rank activations::
#
#     gate       position · count · component · components · column · slot · v_base · v_stride
#                · q_base · q_stride
#     query item position · count · vector · vectors · slot · q_base · q_stride · 0

RANK_TILE = 16
# Rows per chunk. All steps use the same number, so that every row goes through the same MMA
# instruction.
TILE_ROWS = 16
HEADER = 12
RECORD = 8
GATE_RECORD = 10
# Header positions of the chunks and their items, and of the gates and their query items.
CHUNKS = 4
GATES = 8


@dataclass(slots=True)
class _Gates:
    """The gates of a step, as words.

    Attributes:
        gates: The gates' records.
        query_items: The records of their query items.
        num_products: Rows times vectors so far.
        longest: The largest number of gates of one mix.
    """

    gates: list[int] = field(default_factory=list)
    query_items: list[int] = field(default_factory=list)
    num_products: int = 0
    longest: int = 0

    def add(self, gated: GatedMembers, slot: int, chunk: Sequence[int]) -> None:
        """Add the gate of one adapter for the rows of a chunk; ``chunk`` is the chunk's record."""
        position, count, first, _, v_base, v_stride = chunk[:6]
        q_base, vectors = self.num_products, gated.query_length
        components = (first + gated.begin, gated.end - gated.begin, gated.begin)
        self.gates.extend((position, count, *components, slot, v_base, v_stride))
        self.gates.extend((q_base, vectors))
        for j in range(0, vectors, RANK_TILE):
            self.query_items.extend((position, count, j, vectors, slot, q_base + j, vectors, 0))
        self.num_products += count * vectors


class SegmentTable:
    """The segments of a step. Owns its device memory; not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        max_gates: The maximum number of gated adapters of one row's mix.
        rank_capacity: The maximum of rows times ranks in a step, which determines the size of
            ``v``.
        query_capacity: The maximum of rows times vectors of the gates' query items.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_row_rank: int,
        max_components: int,
        device: torch.device,
        max_gates: int = 0,
        max_row_query: int = 0,
        memory: StagedMemory | None = None,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_rows: The maximum number of rows of a step.
            max_row_rank: The maximum sum of the ranks of one row's mix.
            max_components: The maximum number of components of one row's mix.
            device: The device of the kernels.
            max_gates: The maximum number of gated adapters of one row's mix.
            max_row_query: The maximum sum of ``GatedMembers.query_length`` over one row's mix.
            memory: The memory that holds the table; None for memory of its own.
        """
        self.max_rows = max_rows
        self.max_components = max_components
        self.rank_capacity = max_rows * max_row_rank
        self.max_gates = max_gates
        self.query_capacity = max_rows * max_row_query
        # Worst case: every row has its own mix, with one chunk and at most max_row_items items.
        max_row_items = max_components + max_row_rank // RANK_TILE
        max_row_query_items = max_gates + max_row_query // RANK_TILE
        row_records = max_components + 1 + max_row_items + max_row_query_items
        row_words = 1 + RECORD * row_records + GATE_RECORD * max_gates
        capacity = HEADER + max_rows * row_words
        memory = StagedMemory(device, 0) if memory is None else memory
        self._part = memory.part(capacity, torch.int32)
        self.buffer = self._part.buffer

    def load(self, runs: Sequence[RunOfRows]) -> None:
        """Describe a step and start copying the description to the device.

        Args:
            runs: Runs of rows and their mixes; equal mixes are joined into one segment. Kernels do
                not touch rows outside of all runs; runs without components only get the base bias.

        Raises:
            ValueError: The step exceeds a capacity given at construction.
        """
        self._part.load(self._words(runs))

    def _words(self, runs: Sequence[RunOfRows]) -> list[int]:
        segments: dict[tuple[SegmentMember, ...], list[int]] = {}
        last_of: dict[tuple[SegmentMember, ...], RunOfRows] = {}
        for run in runs:
            segments.setdefault(run.members, []).extend(range(run.start, run.end))
            last_of[run.members] = run
        rows: list[int] = []
        components: list[int] = []
        chunks: list[int] = []
        items: list[int] = []
        gates = _Gates()
        v_base = 0
        for mix, members in segments.items():
            first = len(components) // RECORD
            gated = last_of[mix].gated
            offsets = self._add_components(components, mix, gated)
            gates.longest = max(gates.longest, len(gated))
            stride = sum(c.rank_end - c.rank_start for c in mix)
            for start in range(0, len(members), TILE_ROWS):
                count = min(TILE_ROWS, len(members) - start)
                position = len(rows) + start
                base = v_base + start * stride
                last = first + len(mix)
                chunk = (position, count, first, last, base, stride, 0, 0)
                chunks.extend(chunk)
                for adapter in gated:
                    gates.add(adapter, mix[adapter.begin].slot, chunk)
                for c, offset in zip(mix, offsets, strict=True):
                    for j in range(0, c.rank_end - c.rank_start, RANK_TILE):
                        items.extend((position, count, c.rank_start + j, c.rank_end, c.slot))
                        items.extend((base + offset + j, stride, j))
            rows.extend(members)
            v_base += len(members) * stride
        self._check(len(rows), v_base, segments)
        self._check_gates(gates)
        return self._assemble(rows, components, (chunks, items), gates)

    @staticmethod
    def _add_components(
        components: list[int], mix: tuple[SegmentMember, ...], gated: tuple[GatedMembers, ...]
    ) -> list[int]:
        offsets, offset = [], 0
        is_gated = {i for adapter in gated for i in range(adapter.begin, adapter.end)}
        for i, c in enumerate(mix):
            (weight,) = struct.unpack("<i", struct.pack("<f", c.weight))
            words = (c.rank_start, c.rank_end, c.slot, offset, weight, i in is_gated, 0, 0)
            components.extend(words)
            offsets.append(offset)
            offset += c.rank_end - c.rank_start
        return offsets

    def _check(
        self, num_rows: int, ranks: int, segments: dict[tuple[SegmentMember, ...], list[int]]
    ) -> None:
        if num_rows > self.max_rows:
            raise ValueError(f"the step has {num_rows} rows; {self.max_rows} are allocated")
        if ranks > self.rank_capacity:
            raise ValueError(
                f"the step has {ranks} rows times ranks; {self.rank_capacity} are allocated"
            )
        longest = max((len(mix) for mix in segments), default=0)
        if longest > self.max_components:
            raise ValueError(f"a mix has {longest} components; {self.max_components} are allocated")

    def _check_gates(self, gates: _Gates) -> None:
        if gates.longest > self.max_gates:
            raise ValueError(f"a mix has {gates.longest} gates; {self.max_gates} are allocated")
        if gates.num_products > self.query_capacity:
            raise ValueError(
                f"the gates of the step have {gates.num_products} products with queries; "
                f"{self.query_capacity} are allocated"
            )

    @staticmethod
    def _assemble(
        rows: list[int],
        components: list[int],
        cut: tuple[list[int], list[int]],
        gates: _Gates,
    ) -> list[int]:
        words = [0] * HEADER
        words[0] = len(rows)
        words[1] = len(words)
        words.extend(rows)
        words[2] = len(words)
        words.extend(components)
        gated = (gates.gates, gates.query_items)
        for position, record, (heads, parts) in (
            (CHUNKS, RECORD, cut),
            (GATES, GATE_RECORD, gated),
        ):
            words[position] = len(heads) // record
            words[position + 1] = len(words)
            words.extend(heads)
            words[position + 2] = len(parts) // RECORD
            words[position + 3] = len(words)
            words.extend(parts)
        return words


# Attention metadata of a step on the device, in one buffer of fixed address.
#
# The queries of a sequence are cut into *items* of at most ``tile_rows`` query rows (new tokens
# times the query heads of a KV head). A sequence's keys are cut into *splits* at fixed positions,
# multiples of ``split``, in every batch. A *record* is an item with a run of splits. An item is
# either *spread* (one split per record, so that a long context fills the device) or *whole* (all
# splits in one record, without intermediate results in memory). Both kinds merge splits in the same
# order, so the bits are the same, and each item can be of either kind, whatever the other items
# are. Sequences are spread as far as there is scratch memory: those with the fewest items first,
# because they would leave most of the device idle, and among these the longest. The records of
# spread items precede all others::
#
#     header   num_records · records@ · 0 · 0
#     record   row · tokens · position · blocks@ · padding · split_begin · split_end
#              · first record of the item · number of the item's records
#
# Block numbers are in a separate buffer, which outlives the step (``BlockTables``); ``blocks@`` is
# the position of the sequence's first block number there.

ATTENTION_HEADER = 4
ATTENTION_RECORD = 9
# Default number of positions per split; a multiple of every block size.
SPLIT = 256


class AttentionTable:
    """The attention metadata of a step. Owns its device memory; not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        blocks: Block numbers of all sequences, int32 on the device.
        counters: The number of an item's finished records, ``[spread_records · kv_heads]`` int32,
            at its first record and head; zero between launches.
        max_records: The maximum number of records of a step.
        spread_records: The maximum number of records of spread items, which determines the size of
            the kernels' scratch memory.
        split: Positions per split, a multiple of the kernel's tile. The same in all steps, because
            it determines the order of a row's sums.
        tile_rows: Query rows per item: 16, or 32 if a KV head has more queries than that. The same
            in all steps of a model, because it determines how the warps share a sum over keys.
        kv_heads: The number of KV heads.
        queries_per_head: Query heads per KV head.
        window: Sliding window in tokens, or None.
    """

    def __init__(
        self,
        *,
        max_records: int,
        blocks: torch.Tensor | int,
        kv_heads: int,
        queries_per_head: int,
        window: int | None,
        device: torch.device,
        spread_records: int,
        memory: StagedMemory | None = None,
        split: int = SPLIT,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_records: The maximum number of records of a step: of whole items, plus
                ``spread_records``.
            blocks: Block numbers on the device, which the caller keeps up to date; or, for
                ``load``, the number of block numbers for which the table itself has room.
            kv_heads: See the class.
            queries_per_head: See the class.
            window: See the class.
            device: Where the kernels run.
            spread_records: See the class; 0 spreads nothing.
            memory: The memory that holds the table; None for memory of its own.
            split: See the class.

        Raises:
            ValueError: ``queries_per_head`` is over 32.
        """
        if queries_per_head > 32:
            raise ValueError(f"{queries_per_head} queries per KV head; at most 32 are supported")
        self.max_records = max_records
        self.spread_records = spread_records
        self.split = split
        self.tile_rows = 16 if queries_per_head <= 16 else 32
        self.kv_heads = kv_heads
        self.queries_per_head = queries_per_head
        self.window = window
        memory = StagedMemory(device, 0) if memory is None else memory
        self._memory = memory
        self._part = memory.part(ATTENTION_HEADER + max_records * ATTENTION_RECORD, torch.int32)
        self.buffer = self._part.buffer
        self._own_blocks = memory.part(blocks, torch.int32) if isinstance(blocks, int) else None
        self.blocks = blocks if self._own_blocks is None else self._own_blocks.buffer
        counters = max(1, spread_records * kv_heads)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    def load(self, spans: Sequence[SequenceSpan]) -> None:
        """Describe a step, block numbers included, and start copying the description to the device.

        Raises:
            ValueError: The step exceeds a capacity given at construction.
        """
        assert self._own_blocks is not None, "block numbers are somebody else's"
        blocks: list[int] = []
        sequences: list[int] = []
        for s in spans:
            sequences += (s.row_start, s.num_new, s.num_context, len(blocks), s.num_padding)
            blocks.extend(s.blocks)
        with self._memory.step():
            self._own_blocks.load(blocks)
            self.load_words(self.words(sequences))

    def load_words(self, words: torch.Tensor) -> None:
        """Load the result of ``words`` for a step whose block numbers are on the device."""
        with self._memory.step():
            self._part.staged(len(words)).copy_(words)

    def words(self, spans: Sequence[int]) -> torch.Tensor:
        """A step's description, int32 on the host.

        Args:
            spans: Five numbers per sequence, one sequence after the other: its first row, its
                number of new tokens, the number of tokens before them, the position of its block
                numbers in ``blocks``, and the number of leading positions that are not seen.

        Raises:
            ValueError: The step exceeds a capacity given at construction.
        """
        # Operate on whole columns: a step with 64 long contexts has a thousand records.
        table = host_tensor(spans, torch.int32).view(len(spans) // 5, 5)
        num_new, size = table[:, 1], self.tile_rows // self.queries_per_head
        counts = (num_new + (size - 1)) // size
        spread = self._spread(table, counts)
        items, span_of = self._items(table, counts)
        first, last = self._splits(items)
        runs = torch.where(spread[span_of], last - first, 1)
        # Put spread items first and keep the order otherwise.
        order = torch.cat((spread[span_of].nonzero()[:, 0], (~spread[span_of]).nonzero()[:, 0]))
        items, first, last, runs = items[order], first[order], last[order], runs[order]
        ends = runs.cumsum(0)
        begins = ends - runs
        num_records = int(ends[-1]) if len(ends) else 0
        if num_records > self.max_records:
            raise ValueError(
                f"the step has {num_records} records; {self.max_records} are allocated"
            )
        item_of = _repeated(begins, num_records)
        count, begin = runs[item_of], begins[item_of]
        split = first[item_of] + torch.arange(num_records) - begin
        words = torch.zeros(ATTENTION_HEADER + num_records * ATTENTION_RECORD, dtype=torch.int32)
        words[:2] = host_tensor((num_records, ATTENTION_HEADER), torch.int32)
        records = words[ATTENTION_HEADER:].view(-1, ATTENTION_RECORD)
        records[:, :5] = items[item_of]
        records[:, 5] = split
        records[:, 6] = torch.where(count == 1, last[item_of], split + 1)
        records[:, 7] = torch.where(count == 1, 0, begin)
        records[:, 8] = count
        return words

    def _items(
        self, spans: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items as spans of few tokens, ``[items, 5]``, and the index of each one's span."""
        size, total = self.tile_rows // self.queries_per_head, int(counts.sum())
        if total == len(spans):
            return spans, torch.arange(total)
        begins = counts.cumsum(0) - counts
        span_of = _repeated(begins, total)
        first = ((torch.arange(total) - begins[span_of]) * size).to(torch.int32)
        items = spans[span_of]
        items[:, 0] += first
        items[:, 1] = (items[:, 1] - first).clamp(max=size)
        items[:, 2] += first
        return items, span_of

    def _splits(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each item, the range of the splits that any of its tokens sees; never empty."""
        _, tokens, position, _, first = items.unbind(1)
        if self.window is not None:
            first = torch.maximum(first, position - (self.window - 1))
        return first // self.split, (position + tokens - 1) // self.split + 1

    def _spread(self, spans: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """A mask of the sequences that are spread."""
        first, last = self._splits(spans)
        splits = last - first
        records = counts * splits
        chosen = splits > 1
        if int(torch.where(chosen, records, 0).sum()) <= self.spread_records:
            return chosen
        left = self.spread_records
        sizes = zip(counts.tolist(), (-splits).tolist(), range(len(splits)), strict=True)
        for items, minus_splits, number in sorted(sizes):
            fits = minus_splits < -1 and items * -minus_splits <= left
            chosen[number] = fits
            left += items * minus_splits if fits else 0
        return chosen


def _repeated(begins: torch.Tensor, total: int) -> torch.Tensor:
    """For each of ``total`` positions, the index of its run; runs are not empty.

    ``torch.repeat_interleave`` would wake a team of threads for that.
    """
    places = torch.zeros(total, dtype=torch.int64)
    places[begins[1:]] = 1
    return places.cumsum(0)
