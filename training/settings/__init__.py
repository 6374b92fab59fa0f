"""The settings of a training run: one frozen dataclass per TOML table.

Each field has a help text, from which the commented file of ``turret train init`` and the reference
in ``docs/training.md`` are generated. ``None`` means that the method (``DECLARED``) or the
machine determines the value; ``turret train plan`` shows it.
"""

from __future__ import annotations

import dataclasses
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from turret.server.basics.files import unreadable
from turret.server.basics.names import closest
from turret.server.basics.settings import (
    TABLE,
    Layer,
    Name,
    Names,
    Number,
    SettingsError,
    Switch,
    Violation,
    Whole,
    fields_of,
    load,
    parse_toml,
    tables_of,
    text_of,
    toml_value,
)
from turret.training.words import ConfigError, ConfigFileError, say


class Declared(NamedTuple):
    """A method's peak learning rate, and the keys of ``MethodConfig`` that it reads.

    Attributes:
        learning_rate: The rate if the config sets none.
        defaults: The default of each key, in the order in which keys are filled in. None means
            that the method computes the value from earlier keys, or that the key may stay unset.
    """

    learning_rate: float
    defaults: Mapping[str, Any]


_ALL = {"targets": ("all-linear",)}
_FACTORS = {**_ALL, "rank": 8, "dropout": 0.0}
DECLARED: Mapping[str, Declared] = {
    "lora": Declared(1e-3, {**_FACTORS, "alpha": None}),
    # The scale falls with the square root of the rank; at rank 16 it is LoRA's default.
    "rslora": Declared(1e-3, {**_FACTORS, "alpha": 8.0}),
    "dora": Declared(1e-3, {**_FACTORS, "alpha": None}),
    # aLoRA affects fewer tokens than LoRA; a higher rank compensates for that.
    "alora": Declared(1e-3, {**_FACTORS, "rank": 32, "alpha": None, "invocation": None}),
    "miss": Declared(1e-3, {**_FACTORS, "rank": 16}),
    "oft": Declared(1e-3, {**_FACTORS, "rank": 16}),
    "hra": Declared(5e-3, {**_ALL, "rank": 8}),
    # PEFT's example uses 1e-3 for the vector bank and 1e-2 for the logits; here all have one rate.
    "vblora": Declared(1e-2, {**_FACTORS, "rank": 4}),
    "shira": Declared(1e-3, {**_ALL, "rank": 8}),
    "loha": Declared(2e-3, {**_FACTORS, "rank": None, "alpha": None}),
    "lokr": Declared(
        2e-3, {**_FACTORS, "alpha": None, "decompose_both": False, "decompose_factor": -1}
    ),
    # The paper adapts keys, values and the feed-forward layers.
    "ia3": Declared(1e-2, {"targets": ("k_proj", "v_proj", "down_proj")}),
    "prefix_tuning": Declared(
        1e-3, {"num_virtual_tokens": 16, "prefix_projection": True, "encoder_hidden_size": None}
    ),
    "prompt_tuning": Declared(3e-2, {"num_virtual_tokens": 16, "init_text": None}),
    "p_tuning": Declared(
        1e-3, {"num_virtual_tokens": 16, "encoder_hidden_size": None, "dropout": 0.0}
    ),
    "learned_fusion": Declared(3e-3, {"components": None, "d_k": 8, "guidance": 1.0}),
}
METHOD_NAMES = tuple(DECLARED)


def _key(
    help: str, default: Any = ..., *, chosen: str = "", sample: Any = None, **rules: Any
) -> Any:
    """A field with its help, the origin of its default, and a sample value."""
    extra: Any = {"chosen": chosen, "sample": sample}
    return Field(default=default, description=help, json_schema_extra=extra, **rules)


def _method(value: str) -> str:
    if value in METHOD_NAMES:
        return value
    # Accept other spellings, such as p-tuning and P_Tuning.
    plain = value.lower().replace("-", "_")
    near = plain if plain in METHOD_NAMES else closest(plain, METHOD_NAMES)
    raise ValueError(
        say("NOT_ONE_OF", choices=", ".join(METHOD_NAMES), value=value[:60], closest=near)
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class BaseConfig:
    """The base model for the training; its weights never change."""

    model: str | None = _key(
        "directory of a Hugging Face checkpoint, org/name[@revision] of the hub, or a .gguf file",
        None,
        chosen="the bundled SmolLM2-135M-Instruct",
        sample="models/Qwen2.5-0.5B-Instruct",
    )
    weights: Literal["nf4", "nf4-dense", "full"] | None = _key(
        "nf4: 4-bit, double quantised, as on the server (QLoRA); nf4-dense: the same "
        "values, dequantised once (as large as the checkpoint); full: the checkpoint's own",
        None,
        chosen="nf4, which every method supports",
        sample="nf4",
    )
    dtype: Literal["bfloat16", "float32"] | None = _key(
        "dtype of the base's activations; trained weights are always float32",
        None,
        chosen="bfloat16 if the device supports it, else float32",
        sample="bfloat16",
    )
    device: Literal["cpu", "cuda"] | None = _key(
        "device for the training", None, chosen="cuda if available", sample="cpu"
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class MethodConfig:
    """The method of the adapter. Keys that do not apply to the method are rejected."""

    name: Annotated[str, AfterValidator(_method)] = _key(
        f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}", "lora"
    )
    targets: Names | None = _key(
        'linear modules to adapt: one preset (["attention"], ["mlp"], ["all-linear"]) or module '
        "names",
        None,
        chosen="by method",
        sample=("all-linear",),
        min_length=1,
    )
    rank: Whole | None = _key(
        "size of the update's factors", None, chosen="by method", sample=8, ge=1
    )
    alpha: Number | None = _key(
        "the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))",
        None,
        chosen="by method",
        sample=16.0,
        gt=0,
    )
    dropout: Number | None = _key(
        "share of the adapter's inputs to drop while training",
        None,
        chosen="0",
        sample=0.05,
        ge=0,
        lt=1,
    )
    decompose_both: Switch | None = _key(
        "LoKr: factorise the small factor too", None, chosen="false", sample=True
    )
    decompose_factor: Whole | None = _key(
        "LoKr: size of the small factor; -1 selects the most nearly square one",
        None,
        chosen="-1",
        sample=8,
    )
    num_virtual_tokens: Whole | None = _key(
        "length of the learned prompt or prefix", None, chosen="by method", sample=16, ge=1
    )
    prefix_projection: Switch | None = _key(
        "prefix tuning: learn the prefix through a two-layer network; only its output is saved",
        None,
        chosen="true",
        sample=False,
    )
    encoder_hidden_size: Whole | None = _key(
        "width of the network that computes a projected prefix or a p-tuning prompt",
        None,
        chosen="by method",
        sample=256,
        ge=1,
    )
    init_text: str | None = _key(
        "prompt tuning: start from the embeddings of this text, repeated or cut to length",
        None,
        chosen="random embeddings",
        sample="Answer with one word.",
    )
    invocation: str | None = _key(
        "aLoRA: text that every prompt contains; the adapter takes effect at its last occurrence",
        None,
        chosen="the text that the chat template writes before an answer",
        sample="<|im_start|>assistant\n",
        min_length=1,
    )
    components: Names | None = _key(
        "learned fusion: the adapters to fuse, each a directory or NAME=DIRECTORY",
        None,
        chosen="required for learned_fusion",
        sample=("json=adapters/json", "sql=adapters/sql"),
    )
    d_k: Whole | None = _key(
        "learned fusion: width of queries and keys", None, chosen="by method", sample=8, ge=1
    )
    guidance: Number | None = _key(
        "learned fusion: weight of the penalty on gates that deviate from the component "
        "that, on its own, answers an example best; 0 for none",
        None,
        chosen="by method",
        sample=0.5,
        ge=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class DataConfig:
    """JSONL files of objects with ``messages``, ``prompt`` and ``completion``, or ``text``.

    Paths are relative to the config file.
    """

    train: Name = _key("examples to learn from", sample="train.jsonl")
    validation: str | None = _key(
        "examples to validate on, disjoint from train",
        None,
        chosen="validation_fraction of train",
        sample="validation.jsonl",
    )
    validation_fraction: Number = _key(
        "share of train to hold out if validation is not set; 0 disables validation",
        0.1,
        ge=0,
        lt=1,
    )
    task: Literal["generation", "classification"] = _key(
        "generation: completions are texts to learn; classification: completions (or the key "
        "labels) are labels, and the adapter gets a head that predicts them (SEQ_CLS, for "
        "Classify)",
        "generation",
    )
    max_length: Whole = _key("maximum tokens of an example, and of a packed row", 512, ge=2)
    too_long: Literal["drop", "truncate", "error"] = _key(
        "treatment of examples over max_length; drop reports their number", "drop"
    )
    template: Literal["auto", "chat", "none"] = _key(
        "chat: prompt and completion become a chat turn; none: they stay as they are; auto: chat "
        "if the model has a chat template",
        "auto",
    )
    loss_on: Literal["completion", "all"] = _key(
        "completion: learn only completions and assistant turns; all: learn prompts, too",
        "completion",
    )
    packing: Switch = _key(
        "pack several examples into a row; they do not attend to each other", False
    )

    def __post_init__(self) -> None:
        if self.task == "classification" and self.loss_on == "all":
            raise SettingsError(Violation("data.loss_on", say("LABELS_ARE_LEARNED")))


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to 0."""

    name: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = _key(
        "adamw8bit: bitsandbytes' 8-bit states; paged-adamw8bit: these states move to "
        "host memory when the GPU is full (CUDA only; adamw8bit elsewhere)",
        "adamw",
    )
    learning_rate: Number | None = _key(
        "peak learning rate", None, chosen="by method", sample=1e-3, gt=0
    )
    lora_plus_ratio: Number | None = _key(
        "LoRA+: learning rate of B divided by that of A", None, chosen="1", sample=16.0, ge=1
    )
    weight_decay: Number = _key("weight decay of AdamW", 0.0, ge=0)
    beta1: Number = _key("beta 1 of AdamW", 0.9, ge=0, lt=1)
    beta2: Number = _key("beta 2 of AdamW", 0.999, ge=0, lt=1)
    warmup_fraction: Number = _key(
        "share of the steps over which the learning rate rises", 0.1, ge=0, lt=1
    )
    max_grad_norm: Number = _key(
        "maximum norm of the gradients, which are scaled down to it; 0 disables the limit",
        1.0,
        ge=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class RunConfig:
    """The length of the run, the size of its batches, and its output."""

    output: Name = _key(
        "directory of the run, relative to the config file; its adapter/ is the result", "run"
    )
    epochs: Number = _key("passes over the training data; ignored if steps is set", 3.0, gt=0)
    steps: Whole | None = _key("optimizer steps", None, chosen="from epochs", sample=200, ge=1)
    batch_size: Whole = _key("examples (or packed rows) in one pass through the model", 8, ge=1)
    gradient_accumulation: Whole = _key("passes per optimizer step", 1, ge=1)
    gradient_checkpointing: Switch = _key(
        "compute each layer's activations twice instead of keeping them in memory", False
    )
    seed: Whole = _key("seed of weights, data order and dropout", 0, ge=0)
    validate_every: Whole = _key(
        "steps between validations; the last step always validates", 50, ge=1
    )
    checkpoint_every: Whole = _key("steps between checkpoints; 0 writes none", 50, ge=0)
    keep_checkpoints: Whole = _key("number of newest checkpoints to keep", 2, ge=1)
    samples: Whole = _key(
        "number of validation prompts that the base and the adapter answer for the report",
        3,
        ge=0,
    )
    report_to: Literal["none", "tensorboard"] = _key(
        "tensorboard: also write the metrics as TensorBoard events, in the run's tensorboard/",
        "none",
    )
    adapter_dtype: Literal["float16", "bfloat16", "float32"] = _key(
        "dtype of the saved adapter's tensors", "float16"
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class TrainConfig:
    """The whole file."""

    base: BaseConfig
    method: MethodConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig


_COMMENT_COLUMNS = 96


def read_config(
    path: Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a file.

    Args:
        path: A TOML file, with a table per field of :class:`TrainConfig`.
        overrides: ``TABLE.KEY=VALUE``, with the value in TOML or as a bare string; later ones win.
        flags: Table → key → value; these win over the file and the overrides.

    Raises:
        ConfigFileError: The file cannot be read, or has unknown keys or invalid values; lists all.
    """
    try:
        tables = parse_toml(path.read_bytes())
    except OSError as error:
        text = unreadable(path, error)
        if isinstance(error, FileNotFoundError) and "closest" not in text.params:
            text = say("NO_CONFIG", path=path)
        raise ConfigFileError(Violation("", text)) from error
    except ValueError as error:
        raise ConfigFileError(Violation("", text_of(error)), path=path) from error
    try:
        return build_config(tables, overrides, flags)
    except ConfigError as error:
        raise ConfigFileError(*error.violations, path=path) from None


def build_config(
    tables: Mapping[str, Any],
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Make a config from the tables of a TOML file; see :func:`read_config`."""
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and table and key):
            raise ConfigError(Violation("--set", say("NOT_KEY_VALUE", value=override)))
        given.setdefault(table, {})[key] = parse_value(text)
    empty: dict[str, Any] = {table: {} for table in tables_of(TrainConfig)}
    try:
        layers = (flags or {}, given, empty | dict(tables))
        return load(TrainConfig, [Layer("", each) for each in layers])
    except SettingsError as error:
        raise ConfigError(*error.violations) from None


def parse_value(text: str) -> Any:
    """A value in TOML, or a bare string."""
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def render_config(config: TrainConfig) -> str:
    """Every key that has a value, without comments, as a run records them."""
    lines = []
    for table in dataclasses.fields(config):
        part = getattr(config, table.name)
        lines += ["", f"[{table.name}]"]
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            if value is not None:
                lines.append(f"{entry.name} = {toml_value(value)}")
    return "\n".join(lines[1:]) + "\n"


def render_commented() -> str:
    """The file of ``turret train init``: every key with its default and its meaning."""
    lines = [
        "# Settings of a run, for `turret train plan|run|sweep`. For keys that are commented out,",
        "# turret chooses values by method and machine: `turret train plan` shows the choices.",
    ]
    for table, kind in tables_of(TrainConfig).items():
        summary = (kind.__doc__ or "").replace("``", "`").split("\n\n")
        lines += ["", *_comment(" ".join(part.replace("\n", " ") for part in summary))]
        lines.append(f"[{table}]")
        for name, info in fields_of(kind).items():
            extra: Any = info.json_schema_extra
            note = f" (default: {extra['chosen']})" if extra["chosen"] else ""
            lines += _comment((info.description or "") + note)
            mark = "# " if info.default is None else ""
            shown = extra["sample"] if mark or info.is_required() else info.default
            lines.append(f"{mark}{name} = {toml_value(shown)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _COMMENT_COLUMNS)]
