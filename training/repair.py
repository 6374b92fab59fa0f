"""The LoRA that best corrects the quantisation of a model.

For each module, the LoRA is the best approximation of the quantisation error by a matrix of the
given rank, as in LQER (arXiv 2402.02446). The squared error at each input of the module is weighted
by the input's mean square over a text, which the quantised model reads once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.adapter import PROVENANCE_FILE
from turret.server.adapters.fuser import lora_of
from turret.server.adapters.operators.low_rank import LoraModule
from turret.server.models.model_source import StoredTensors
from turret.server.models.sources.check import find_gguf
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import read_config, scale_block, weight_files
from turret.training.adapter_folder import new_folder, write_adapter
from turret.training.base_model import FrozenNf4Linear, TrainingBase, load_model
from turret.training.run.provenance import describe_base
from turret.training.serving_cost import served_base
from turret.training.words import RunError, say

_ROW_TOKENS = 512
_MAX_TOKENS = 16 * _ROW_TOKENS
# Inputs that the text hardly uses count as much as this share of the mean.
_LEAST = 0.01


@dataclass(frozen=True, slots=True)
class Repair:
    """The result of a repair.

    Attributes:
        num_modules: The number of modules with a LoRA.
        before: The error of the modules' weights, ``‖Δ‖ / ‖W‖`` over all of them, with inputs
            weighted as described above.
        after: The same with the LoRA.
    """

    num_modules: int
    before: float
    after: float


@torch.no_grad()
def repair(
    base: TrainingBase, output: Path, *, rank: int, text: str, progress: Callable[[str], None]
) -> Repair:
    """Write an adapter that corrects the quantisation of a model.

    Args:
        base: The model.
        output: A new or an empty directory.
        rank: The rank of the LoRAs.
        text: The text that weighs the inputs.
        progress: Called with a description of what is done next.

    Raises:
        RunError: The files of the model contain only the weights that are served.
    """
    if base.source.fidelity is None:
        raise RunError(say("NOTHING_TO_REPAIR", path=base.source.weights))
    progress("reading the text")
    model = load_model(base, "nf4", torch.bfloat16, "cpu").eval()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, FrozenNf4Linear)}
    modules = {name: module for name, module in modules.items() if ".experts." not in name}
    scales = _input_scales(model, modules, base.tokenizer(text).input_ids)
    loras: dict[str, LoraModule] = {}
    squares = torch.zeros(3, dtype=torch.float64)
    for name, weight in _stored(base):
        module = name.removesuffix(".weight")
        if name == module or module not in modules:
            continue
        progress(f"approximating the error of {module}")
        scale = scales[module]
        weight = weight.to(torch.bfloat16).float() * scale
        residual = weight - modules[module].dequantize(torch.float32) * scale
        left, values, right = _largest(residual, rank)
        a, b = (right * values.sqrt()).T / scale, left * values.sqrt()
        loras[module] = LoraModule(a, b, None)
        before = residual.square().sum()
        # At full rank, the remaining error is 0, and rounding may make it negative.
        after = (before - values.square().sum()).clamp_min(0)
        squares += torch.stack((weight.square().sum(), before, after)).double()
    with new_folder(output) as build:
        config, tensors = lora_of(loras, served_base(base), base.source.name)
        write_adapter(build, config, tensors, torch.float16)
        facts = json.dumps({"base": describe_base(base.source)}, indent=2, sort_keys=True)
        (build / PROVENANCE_FILE).write_text(f"{facts}\n", encoding="utf-8")
    whole, before, after = squares.tolist()
    return Repair(len(loras), (before / whole) ** 0.5, (after / whole) ** 0.5)


def _largest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of the singular value decomposition with the largest singular values.

    A randomised decomposition is faster than a whole one. In modules of SmolLM2, the sum of the
    squares of its 32 values is at least 98% of that of the 32 largest singular values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=4)
    return left[:, :rank], values[:rank], right[:, :rank]


def _input_scales(
    model: Any, modules: Mapping[str, FrozenNf4Linear], ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The root mean square of each input of each module, divided by the mean over its inputs."""
    sums = {name: torch.zeros(module.in_features) for name, module in modules.items()}

    def add(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sums[name] += inputs[0].float().square().sum((0, 1))

    hooks = [m.register_forward_pre_hook(partial(add, name)) for name, m in modules.items()]
    for start in range(0, min(len(ids), _MAX_TOKENS), _ROW_TOKENS):
        model.model(torch.tensor([ids[start : start + _ROW_TOKENS]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    roots = {name: total.sqrt() for name, total in sums.items()}
    return {name: (root / root.mean()).clamp_min(_LEAST) for name, root in roots.items()}


def _stored(base: TrainingBase) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in the files of the model, one at a time."""
    directory = base.directory
    if directory is None or directory.suffix == SUFFIX:
        yield from open_gguf(find_gguf() if directory is None else directory).tensors
        return
    files = base.source.files
    block = scale_block(read_config(files))
    tensors = StoredTensors(weight_files(files), base.arch.experts, block)
    for name in tensors:
        yield name, tensors.get(name)
