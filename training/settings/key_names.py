"""The keys of the config, and what other tools call them."""

from __future__ import annotations

import dataclasses
import typing

from turret.server.basics.closest import closest
from turret.training.settings.config import TrainConfig

# Names of settings in Hugging Face's trainers, PEFT, Axolotl and LLaMA-Factory → turret's key.
ELSEWHERE = {
    **dict.fromkeys(("base_model", "model_name", "model_name_or_path"), "base.model"),
    **dict.fromkeys(("adapter", "peft_type", "finetuning_type"), "method.name"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "method.rank"),
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), "method.targets"),
    **dict.fromkeys(("data", "dataset", "train_file", "train_data", "data_path"), "data.train"),
    **dict.fromkeys(("validation_file", "eval_file", "eval_dataset"), "data.validation"),
    **dict.fromkeys(("val_set_size", "val_size"), "data.validation_fraction"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "data.max_length"
    ),
    "optim": "optimizer.name",
    "lr": "optimizer.learning_rate",
    "warmup_ratio": "optimizer.warmup_fraction",
    "output_dir": "run.output",
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "run.epochs"),
    "max_steps": "run.steps",
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), "run.batch_size"
    ),
    "gradient_accumulation_steps": "run.gradient_accumulation",
    "eval_steps": "run.validate_every",
    "save_steps": "run.checkpoint_every",
    "save_total_limit": "run.keep_checkpoints",
}


def all_keys() -> list[str]:
    """Every ``TABLE.KEY``."""
    return [
        f"{table}.{entry.name}"
        for table, kind in typing.get_type_hints(TrainConfig).items()
        for entry in dataclasses.fields(kind)
    ]


def meant_key(name: str) -> str | None:
    """The key of that name in a table, or one that is close; other tools' names too.

    Args:
        name: ``TABLE.KEY`` that is none, or one of the two.
    """
    table, _, last = name.rpartition(".")
    if known := ELSEWHERE.get(last.replace("-", "_").lower()):
        return known
    keys = all_keys()
    inside = [key for key in keys if key.startswith(f"{table}.")] or keys
    names = {key.rpartition(".")[2]: key for key in inside}
    elsewhere = {key.rpartition(".")[2]: key for key in keys}
    if last == "name":
        # "name" is a key of two tables, and other tools use it for the model: ambiguous.
        return names[last] if inside != keys and last in names else None
    return names.get(last) or elsewhere.get(last) or names.get(closest(last, names) or "")
