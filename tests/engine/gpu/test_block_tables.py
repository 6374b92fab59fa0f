"""Block numbers on the device: the transfers add up to what every step needs."""

from __future__ import annotations

import random
import weakref

import torch
from builders.sequences import sequence_of

from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.gpu_tables import BlockTables

CPU = torch.device("cpu")


def send(tables: BlockTables, step: list[Sequence]) -> int:
    """Update the device and check it; returns the number of transferred block numbers."""
    updates = tables.update(step)
    tables.write(
        torch.tensor(updates.places).long(), torch.tensor(updates.numbers, dtype=torch.int32)
    )
    assert len(set(updates.begins)) == len(step), "two sequences share a row"
    for sequence, begin in zip(step, updates.begins, strict=True):
        found = tables.buffer[begin : begin + len(sequence.blocks)].tolist()
        assert found == sequence.blocks
    assert int(tables.buffer[0]) == 0
    return len(updates.places)


def make(*blocks: int) -> Sequence:
    sequence = sequence_of([1])
    sequence.blocks = list(blocks)
    return sequence


def test_only_new_block_numbers_are_sent():
    tables = BlockTables(4, 8, CPU)
    one, two = make(5, 6, 7), make(8)
    assert send(tables, [one, two]) == 4
    assert send(tables, [one, two]) == 0
    one.blocks.append(9)
    assert send(tables, [two, one]) == 1
    # The sequence is preempted and admitted again with the same number of blocks.
    one.blocks = [1, 2, 3, 4]
    assert send(tables, [one, two]) == 4
    tables.clear()
    assert send(tables, [one, two]) == 5


def test_rows_grow_with_the_longest_sequence():
    tables = BlockTables(2, 4, CPU)
    one, two = make(1, 2, 3, 4), make(5)
    send(tables, [one, two])
    assert tables.epoch == 0
    before = tables.buffer
    two.blocks += [6, 7, 8, 9]
    assert send(tables, [one, two]) == 9
    assert tables.epoch == 1
    assert tables.buffer is not before


def test_the_table_of_the_step_before_stays_in_memory():
    tables = BlockTables(4, 2, CPU)
    before = weakref.ref(tables.buffer)
    send(tables, [make(*range(1, 4))])
    assert before() is not None
    send(tables, [make(*range(1, 40))])
    assert before() is None


def test_tables_stay_correct_under_random_traffic():
    """More sequences than rows alternate, grow, are preempted and end."""
    tables, generator = BlockTables(5, 6, CPU), random.Random(2)
    sequences = [make(generator.randrange(1, 99)) for _ in range(9)]
    for _ in range(400):
        step = generator.sample(sequences, generator.randint(1, 5))
        for sequence in step:
            if generator.random() < 0.3 and len(sequence.blocks) < 6:
                sequence.blocks.append(generator.randrange(1, 99))
        send(tables, step)
        gone = generator.choice(sequences)
        if generator.random() < 0.3:
            gone.blocks = [generator.randrange(1, 99) for _ in range(generator.randint(1, 6))]
        elif generator.random() < 0.2:
            tables.forget(gone)
            sequences[sequences.index(gone)] = make(generator.randrange(1, 99))
