"""A classification head, which is attached to any method's model and trained and saved with it.

As in the server, the head gets the final state of the last token before the label. PEFT calls the
task SEQ_CLS; the files have the form in which PEFT saves them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from turret.server.adapters.adapter import CONFIG_FILE, MULTI_LABEL, SINGLE_LABEL, TENSORS_FILE
from turret.server.adapters.peft_format.classifier_checkpoint import HEAD_NAMES, TASK_TYPE
from turret.training.adapter_folder import write_adapter
from turret.training.batches import BatchRow, Dataset, TrainingBatch, make_batch
from turret.training.examples import Encoded
from turret.training.loss import LossFunction
from turret.training.settings.resolve import Resolved

# The figures of ``turret eval --classify``, which compare the predicted labels with the right ones.
#
# F1 is ``2 TP / (2 TP + FP + FN)``. A label that is neither predicted nor right for any example has
# no F1 and is left out of the mean.

# Predicted and correct label indices of one example.
Prediction = tuple[tuple[int, ...], tuple[int, ...]]


def label_metrics(
    judged: Sequence[Prediction], labels: Sequence[str], *, is_multi_label: bool
) -> dict[str, Any]:
    """Figures over examples, each in [0, 1].

    Args:
        judged: At least one example.
        labels: The labels by number.
        is_multi_label: Whether an example may have any number of labels.

    Returns:
        ``accuracy`` (the share of examples with exactly the right labels) and ``macro_f1`` (the
        mean of the labels' F1). With multiple labels, also ``micro_f1`` (of all decisions together)
        and ``label_f1`` (the F1 of each label by its name).
    """
    both = Counter(label for found, right in judged for label in {*found} & {*right})
    either = Counter(label for pair in judged for side in pair for label in side)
    f1 = {label: 2 * both[label] / count for label, count in sorted(either.items())}
    figures: dict[str, Any] = {
        "accuracy": sum({*found} == {*right} for found, right in judged) / len(judged),
        # If no label is predicted and none is right, all predictions are correct.
        "macro_f1": sum(f1.values()) / len(f1) if f1 else 1.0,
    }
    if is_multi_label:
        total = either.total()
        figures["micro_f1"] = 2 * both.total() / total if total else 1.0
        figures["label_f1"] = {labels[label]: value for label, value in f1.items()}
    return figures


# The head and its loss.

_NAME = "score"
# A multi-label model predicts a label if its probability exceeds this.
_THRESHOLD = 0.5


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
    """The figures of ``turret eval --classify`` over rows; see ``label_metrics``."""
    judged: list[Prediction] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        judged += loss.labels(make_batch(part, pad=pad, is_packed=False))
    return label_metrics(judged, labels, is_multi_label=isinstance(loss, MultiLabelLoss))


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
    state[f"base_model.model.{_NAME}.weight"] = getattr(model, _NAME).weight
    saved = {*(config.get("modules_to_save") or ()), *HEAD_NAMES}
    added = {
        "task_type": TASK_TYPE,
        "modules_to_save": sorted(saved),
        "id2label": {str(number): label for number, label in enumerate(dataset.labels)},
        "problem_type": MULTI_LABEL if dataset.is_multi_label else SINGLE_LABEL,
    }
    write_adapter(folder, {**config, **added}, state, dtype)
