"""A classification head, which is attached to any method's model and trained and saved with it.

As in the server, the head gets the final state of the last token before the label. PEFT calls the
task SEQ_CLS; the files have the form in which PEFT saves them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from turret.clients.evaluate import (
    LabelPair,
    label_figures,
    macro_f1_of_sets,
    mean,
    micro_f1_of_sets,
)
from turret.server.adapters.adapter import CONFIG_FILE, MULTI_LABEL, SINGLE_LABEL, TENSORS_FILE
from turret.server.adapters.checkpoint import PEFT_PREFIX
from turret.server.adapters.peft_format.classifier_checkpoint import HEAD_NAMES, TASK_TYPE
from turret.training.adapter_folder import write_adapter
from turret.training.batches import BatchRow, Dataset, TrainingBatch, make_batch
from turret.training.examples import Encoded
from turret.training.loss import LossFunction
from turret.training.settings.resolve import Resolved

_NAME = "score"
# A multi-label model predicts a label if its probability exceeds this.
_THRESHOLD = 0.5
# Predicted and correct label indices of one example.
Prediction = tuple[tuple[int, ...], tuple[int, ...]]


def add_head(model: Any, num_labels: int) -> None:
    """Add a trainable head to an attached model, initialised as in transformers."""
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
        model: A model with the head that ``add_head`` adds.
        device: The model's device.
    """

    def __init__(self, model: Any, device: str) -> None:
        super().__init__(model, model.get_base_model().get_output_embeddings(), device)
        self._score: torch.nn.Linear = getattr(model, _NAME)

    def _head_loss(
        self, states: torch.Tensor, targets: torch.Tensor, reduction: str = "sum"
    ) -> torch.Tensor:
        return cross_entropy(self._score(states.float()), targets, reduction=reduction)

    @torch.no_grad()
    def labels(self, batch: TrainingBatch) -> list[Prediction]:
        """The predicted and the right label numbers of each example."""
        found: list[Prediction] = []
        for states, targets in self._parts(batch):
            numbers = self._score(states.float()).argmax(-1)
            pairs = zip(numbers.tolist(), targets.tolist(), strict=True)
            found += [((number,), (right,)) for number, right in pairs]
        return found


class MultiLabelLoss(ClassifierLoss):
    """The mean binary cross entropy over labels, summed over a batch's examples.

    transformers uses the same loss for ``problem_type`` multi_label_classification.
    """

    def _parts(self, batch: TrainingBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The head's input, and 1 for each right label or else 0, ``[examples, labels]`` fp32."""
        holds = torch.zeros(len(batch.labels), self._score.out_features)
        for row, numbers in enumerate(batch.labels):
            holds[row, list(numbers)] = 1.0
        holds = holds.to(self._device)
        for states, rows in super()._parts(batch):
            yield states, holds[rows]

    def _head_loss(
        self, states: torch.Tensor, targets: torch.Tensor, reduction: str = "sum"
    ) -> torch.Tensor:
        scores = self._score(states.float())
        losses = binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(-1)
        return losses.sum() if reduction == "sum" else losses

    @torch.no_grad()
    def labels(self, batch: TrainingBatch) -> list[Prediction]:
        found: list[torch.Tensor] = []
        for states, _ in self._parts(batch):
            found += self._score(states.float()).sigmoid() > _THRESHOLD
        numbers = [tuple(row.nonzero()[:, 0].tolist()) for row in found]
        return list(zip(numbers, batch.labels, strict=True))


def classifier_loss(model: Any, dataset: Dataset, device: str) -> ClassifierLoss:
    """The loss of a data set's labels."""
    kind = MultiLabelLoss if dataset.is_multi_label else ClassifierLoss
    return kind(model, device)


def make_loss(resolved: Resolved, model: Any) -> LossFunction:
    """The loss that a run minimises."""
    config = resolved.config
    assert config.base.device is not None
    if resolved.dataset.labels:
        return classifier_loss(model, resolved.dataset, config.base.device)
    return resolved.method.loss(model, config.method, config.base.device)


def label_scores(
    loss: ClassifierLoss, rows: Sequence[BatchRow], labels: Sequence[str], batch_size: int, pad: int
) -> dict[str, Any]:
    """The figures of ``turret eval --classify`` over rows, each in [0, 1].

    Returns:
        ``accuracy`` (the share of examples with exactly the right labels) and ``macro_f1`` (the
        mean of the labels' F1). With multiple labels, also ``micro_f1`` (of all decisions together)
        and ``label_f1`` (the F1 of each label by its name).
    """
    pairs: list[LabelPair] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for found, right in loss.labels(make_batch(part, pad=pad, is_packed=False)):
            pairs.append((tuple(labels[n] for n in found), tuple(labels[n] for n in right)))
    figures: dict[str, Any] = {
        "accuracy": mean([float({*found} == {*right}) for found, right in pairs]),
        "macro_f1": macro_f1_of_sets(pairs),
    }
    if isinstance(loss, MultiLabelLoss):
        figures["micro_f1"] = micro_f1_of_sets(pairs)
        figures["label_f1"] = {name: each.f1 for name, each in label_figures(pairs).items()}
    return figures


def label_samples(
    loss: ClassifierLoss, tokenizer: Any, examples: Sequence[Encoded], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Like ``draw_samples``, but without ``before``: the base model alone predicts no labels."""
    samples = []
    for example in examples:
        batch = make_batch([(example,)], pad=0, is_packed=False)
        ((found, right),) = loss.labels(batch)
        samples.append(
            {
                "prompt": tokenizer.decode(example.tokens[:-1]),
                "turns": [list(turn) for turn in example.turns],
                "reference": _shown(right, labels),
                "after": _shown(found, labels),
            }
        )
    return samples


def _shown(numbers: Sequence[int], labels: Sequence[str]) -> str:
    return ", ".join(labels[number] for number in numbers) or "no label"


def write_head(model: Any, folder: Path, dataset: Dataset, dtype: torch.dtype) -> None:
    """Add the head and its labels to an adapter's files.

    Raises:
        RunError: A weight of the head is not finite.
    """
    config: Mapping[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    state = load_file(folder / TENSORS_FILE)
    state[f"{PEFT_PREFIX}{_NAME}.weight"] = getattr(model, _NAME).weight
    saved = {*(config.get("modules_to_save") or ()), *HEAD_NAMES}
    added = {
        "task_type": TASK_TYPE,
        "modules_to_save": sorted(saved),
        "id2label": {str(number): label for number, label in enumerate(dataset.labels)},
        "problem_type": MULTI_LABEL if dataset.is_multi_label else SINGLE_LABEL,
    }
    write_adapter(folder, {**config, **added}, state, dtype)
