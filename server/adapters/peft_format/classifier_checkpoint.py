"""The classification head of a checkpoint with ``task_type`` SEQ_CLS, which any method may have.

PEFT saves the head whole, alongside the method's tensors (``PeftModelForSequenceClassification``
adds ``classifier`` and ``score`` to ``modules_to_save``). PEFT saves no labels. They come from
``id2label`` or ``label2id`` in the config, in transformers' format, if somebody added one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.adapter import (
    MAX_LABEL_CHARS,
    MAX_LABELS,
    MULTI_LABEL,
    PROBLEM_TYPES,
    SINGLE_LABEL,
    Head,
)
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.operators.classifier import Classifier
from turret.server.adapters.peft_format.config_rules import invalid, listed_twice
from turret.server.words import say

TASK_TYPE = "SEQ_CLS"
HEAD_NAMES = ("score", "classifier")
_KEYS = ("id2label", "label2id", "problem_type", "num_labels")
_HEADS = "|".join(HEAD_NAMES)
# PEFT's prefix is shorter for methods that learn a prompt. A raw state dict keeps PEFT's wrapper,
# which also contains the head from before the training.
_OWN = re.compile(
    rf"(?:base_model\.)?(?:{_HEADS})\.(?:modules_to_save\.(?:[^.]+\.)?)?(weight|bias)"
)
_ORIGINAL = re.compile(rf"(?:base_model\.)?(?:{_HEADS})\.original_module\.(weight|bias)")


def take_classifier(
    checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings
) -> tuple[AdapterCheckpoint, Classifier | None, Head | None]:
    """Splits a checkpoint. Raises nothing: problems are added to the findings.

    Returns:
        The rest, for the method; and the head's weights and labels, or None if the adapter does not
        classify.
    """
    rest = without_classifier(checkpoint)
    if rest is checkpoint:
        return rest, None, None
    found: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _OWN.fullmatch(name)
        if match is not None and match[1] in found:
            findings.add(name, say("DUPLICATE_TENSOR", other=f"score.{match[1]}"))
        elif match is not None:
            found[match[1]] = tensor
            _check_shape(name, tensor, base, findings)
    weight = found.get("weight")
    if weight is None:
        findings.add("task_type", say("NO_HEAD_TENSOR", value=TASK_TYPE))
    if weight is None or findings.fields or findings.mismatched:
        return rest, None, None
    classifier = _classifier(weight, found.get("bias"), findings)
    return rest, classifier, _head(checkpoint.config, len(weight), findings)


def without_classifier(checkpoint: AdapterCheckpoint) -> AdapterCheckpoint:
    """The part of the checkpoint for the method, selected by names only."""
    if checkpoint.config.get("task_type") != TASK_TYPE:
        return checkpoint
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (_OWN.fullmatch(name) or _ORIGINAL.fullmatch(name))
    }
    return replace(checkpoint, config=_without_head(checkpoint.config), tensors=tensors)


def _without_head(config: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in config.items() if key not in _KEYS}
    left["task_type"] = None
    if isinstance(config.get("modules_to_save"), list):
        saved = [name for name in config["modules_to_save"] if name not in HEAD_NAMES]
        left["modules_to_save"] = saved or None
    return left


def _check_shape(name: str, tensor: torch.Tensor, base: BaseModel, findings: Findings) -> None:
    if name.endswith("bias"):
        if tensor.ndim != 1:
            _wrong_shape(name, tensor, "one number per label", findings)
        return
    count = tensor.shape[0] if tensor.ndim == 2 else 0
    if not 1 <= count <= MAX_LABELS:
        _wrong_shape(name, tensor, f"1 to {MAX_LABELS} labels by hidden size", findings)
    else:
        findings.check_shape(name, tensor, (count, base.hidden_size))


def _wrong_shape(name: str, tensor: torch.Tensor, expected: str, findings: Findings) -> None:
    findings.add(name, say("WRONG_SHAPE", shape=list(tensor.shape), expected=expected))


def _classifier(
    weight: torch.Tensor, bias: torch.Tensor | None, findings: Findings
) -> Classifier | None:
    if bias is not None and len(bias) != len(weight):
        _wrong_shape("score.bias", bias, f"[{len(weight)}]", findings)
        return None

    own = weight.to(torch.float32, copy=True).contiguous()
    return Classifier(own, None if bias is None else bias.to(torch.float32, copy=True))


def _head(config: Mapping[str, Any], count: int, findings: Findings) -> Head:
    num_labels = config.get("num_labels")
    if num_labels is not None and num_labels != count:
        findings.add("num_labels", invalid(num_labels, str(count)))
    problem = config.get("problem_type")
    if problem is not None and problem not in PROBLEM_TYPES:
        findings.add("problem_type", invalid(problem, f"{', '.join(PROBLEM_TYPES)} or null"))
    if problem not in PROBLEM_TYPES:
        # A single number means one label, which applies or not.
        problem = SINGLE_LABEL if count > 1 else MULTI_LABEL
    return Head(_labels(config, count, findings), problem)


def _labels(config: Mapping[str, Any], count: int, findings: Findings) -> tuple[str, ...]:
    """One label per output: from ``id2label`` or ``label2id``, otherwise ``LABEL_0`` and so on."""
    plain = tuple(f"LABEL_{index}" for index in range(count))
    by_id, by_label = config.get("id2label"), config.get("label2id")
    if by_label is not None:
        is_map = isinstance(by_label, Mapping) and all(type(i) is int for i in by_label.values())
        turned = {str(i): label for label, i in by_label.items()} if is_map else None
        if turned is None or (by_id is not None and turned != by_id):
            findings.add("label2id", invalid(by_label, "the reverse of id2label"))
            return plain
        by_id = turned
    if by_id is None:
        return plain
    if not isinstance(by_id, Mapping) or by_id.keys() != {str(index) for index in range(count)}:
        findings.add("id2label", invalid(by_id, f"an object with the keys 0 to {count - 1}"))
        return plain
    labels = tuple(by_id[str(index)] for index in range(count))
    if not all(isinstance(label, str) and 0 < len(label) <= MAX_LABEL_CHARS for label in labels):
        findings.add("id2label", invalid(by_id, f"labels of 1 to {MAX_LABEL_CHARS} characters"))
        return plain
    if twice := listed_twice(labels):
        findings.add("id2label", twice)
        return plain
    return labels
