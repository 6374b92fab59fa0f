"""A classification head: attached to any method's model, trained with it, saved beside it.

The head sees the final state of the last token before the label, as the server's does. PEFT's own
name for the task is SEQ_CLS; the files are as it saves them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from turret.server.adapters.head import SINGLE_LABEL
from turret.server.adapters.peft_format.classifier_checkpoint import HEAD_NAMES, TASK_TYPE
from turret.server.adapters.source import CONFIG_FILE, TENSORS_FILE
from turret.training.adapter_folder import write_adapter
from turret.training.data.batch import Batch, Row, make_batch
from turret.training.data.encode import Encoded
from turret.training.loss import LossFunction
from turret.training.settings.resolve import Resolved

_NAME = "score"


def add_head(model: Any, num_labels: int) -> None:
    """Give an attached model a head that is trained with it, drawn as transformers draws its."""
    config = model.get_base_model().config
    output = model.get_base_model().get_output_embeddings().weight
    size = output.shape[1]
    head = torch.nn.Linear(size, num_labels, bias=False, device=output.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.normal_(0.0, getattr(config, "initializer_range", 0.02))
    setattr(model, _NAME, head)


class ClassifierLoss(LossFunction):
    """Sum of the cross entropy over a batch's labels.

    Args:
        model: With ``add_head``'s head.
        device: Of the model.
    """

    def __init__(self, model: Any, device: str) -> None:
        super().__init__(model, model.get_base_model().get_output_embeddings(), device)
        self._score: torch.nn.Module = getattr(model, _NAME)

    def _head_loss(
        self, states: torch.Tensor, targets: torch.Tensor, reduction: str = "sum"
    ) -> torch.Tensor:
        return cross_entropy(self._score(states.float()), targets, reduction=reduction)

    @torch.no_grad()
    def labels(self, batch: Batch) -> list[tuple[int, int]]:
        """The label found and the right one of each example, by number."""
        found: list[tuple[int, int]] = []
        for states, targets in self._parts(batch):
            numbers = self._score(states.float()).argmax(-1)
            found += zip(numbers.tolist(), targets.tolist(), strict=True)
        return found


def make_loss(resolved: Resolved, model: Any) -> LossFunction:
    """What a run minimises."""
    config = resolved.config
    assert config.base.device is not None
    if resolved.dataset.labels:
        return ClassifierLoss(model, config.base.device)
    return resolved.method.loss(model, config.method, config.base.device)


def label_scores(
    loss: ClassifierLoss, rows: Sequence[Row], batch_size: int, pad: int
) -> dict[str, float]:
    """Accuracy and macro F1 over rows, as ``turret eval --classify`` has them."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(rows), batch_size):
        pairs += loss.labels(make_batch(rows[start : start + batch_size], pad=pad, is_packed=False))
    right = sum(found == label for found, label in pairs)
    return {"accuracy": right / len(pairs), "macro_f1": _macro_f1(pairs)}


def _macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    both = Counter(label for label, right in pairs if label == right)
    either = Counter(label for pair in pairs for label in pair)
    return sum(2 * both[label] / count for label, count in either.items()) / len(either)


def label_samples(
    loss: ClassifierLoss, tokenizer: Any, examples: Sequence[Encoded], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """As ``draw_samples``: the base model alone has no label to give."""
    samples = []
    for example in examples:
        batch = make_batch([(example,)], pad=0, is_packed=False)
        ((found, right),) = loss.labels(batch)
        samples.append(
            {
                "prompt": tokenizer.decode(example.tokens[:-1]),
                "turns": [list(turn) for turn in example.turns],
                "reference": labels[right],
                "before": "",
                "after": labels[found],
            }
        )
    return samples


def write_head(model: Any, folder: Path, labels: Sequence[str], dtype: torch.dtype) -> None:
    """Add the head and its labels to an adapter's files.

    Raises:
        RunError: A weight of the head is not finite.
    """
    config: Mapping[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    state = load_file(folder / TENSORS_FILE)
    state[f"base_model.model.{_NAME}.weight"] = getattr(model, _NAME).weight
    saved = {*(config.get("modules_to_save") or ()), *HEAD_NAMES}
    added = {
        "task_type": TASK_TYPE,
        "modules_to_save": sorted(saved),
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "problem_type": SINGLE_LABEL,
    }
    write_adapter(folder, {**config, **added}, state, dtype)
