"""Tensors that are evenly spaced in memory form one piece."""

from __future__ import annotations

import random

import torch

from turret.server.adapters.device.gpu.uploads import blocks_of, by_layers
from turret.server.adapters.lowering.lowered import in_one_block
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank


def pieces(found: list[tuple[int, torch.Tensor]]) -> list[tuple[int, int]]:
    """The first layer and the end of every piece, whose content must equal the given tensors."""
    made = list(by_layers(found))
    given = dict(found)
    for layers, tensors in made:
        assert len(tensors) == layers.stop - layers.start
        for layer, tensor in zip(range(layers.start, layers.stop), tensors, strict=True):
            assert torch.equal(tensor, given.pop(layer))
    assert given == {}
    return [(layers.start, layers.stop) for layers, _ in made]


def test_evenly_spaced_tensors_form_one_piece():
    memory = torch.randn(40, 3, 5)
    assert pieces([(i, memory[i]) for i in range(40)]) == [(0, 40)]
    assert pieces([(i, memory[3 * i]) for i in range(10)]) == [(0, 10)]
    assert pieces([]) == []
    assert pieces([(7, memory[2])]) == [(7, 8)]


def test_a_gap_or_another_shape_or_memory_begins_a_new_piece():
    memory = torch.randn(40, 6)
    layers = [(i, memory[i]) for i in (0, 1, 2, 5, 6)]
    assert pieces(layers) == [(0, 3), (5, 7)]
    assert pieces([(0, memory[0]), (1, memory[1, :4]), (2, memory[2, :4])]) == [(0, 1), (1, 3)]
    assert pieces([(0, memory[0]), (1, torch.randn(6)), (2, memory[1])]) == [(0, 1), (1, 2), (2, 3)]
    # Tensors that are not in the order of the layers.
    assert pieces([(0, memory[4]), (1, memory[3]), (2, memory[9])]) == [(0, 1), (1, 3)]
    # Uneven distances: the third tensor is farther away.
    assert pieces([(0, memory[0]), (1, memory[1]), (2, memory[4])]) == [(0, 2), (2, 3)]
    # The same tensor for two layers.
    assert pieces([(0, memory[0]), (1, memory[0])]) == [(0, 1), (1, 2)]


def test_layers_in_the_order_of_a_file_form_one_piece_per_factor():
    """In files, layer 10 precedes layer 2."""
    names = sorted(f"model.layers.{i}.{p}" for i in range(12) for p in ("q_proj", "k_proj"))
    modules = {name: ModuleOperators(LowRank(*torch.randn(2, 4, 8))) for name in names}
    blocked, _ = in_one_block(modules)
    assert list(blocked) == names
    for path in ("q_proj", "k_proj"):
        for factor in range(2):
            found = [(i, blocked[f"model.layers.{i}.{path}"].tensors()[factor]) for i in range(12)]
            assert pieces(found) == [(0, 12)]
    tensors = [tensor for module in blocked.values() for tensor in module.tensors()]
    assert len(blocks_of(tensors)[0]) == 1


def test_blocks_keep_the_content_and_alignment_of_every_tensor():
    chance = random.Random(0)
    for _ in range(50):
        memory = [torch.randn(4096).view(torch.uint8) for _ in range(3)]
        tensors = [torch.empty(0, 4)]
        for _ in range(chance.randint(0, 30)):
            dtype = chance.choice([torch.float32, torch.bfloat16, torch.uint8, torch.int64])
            count = chance.randint(1, 99)
            size = count * dtype.itemsize
            begin = chance.randrange(0, 16384 - size) // dtype.itemsize * dtype.itemsize
            tensors.append(chance.choice(memory)[begin : begin + size].view(dtype))
        blocks, offsets, num_bytes = blocks_of(tensors)
        copied = torch.zeros(num_bytes, dtype=torch.uint8)
        ends = [0]
        for block, begin in blocks:
            assert begin % 16 == 0
            assert begin >= ends[-1], "blocks do not overlap"
            copied[begin : begin + len(block)] = block
            ends.append(begin + len(block))
        for tensor, offset in zip(tensors, offsets, strict=True):
            found = copied[offset : offset + tensor.nbytes].view(tensor.dtype)
            assert found.view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        assert sum(len(block) for block, _ in blocks) <= 3 * 16384
