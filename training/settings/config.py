"""What a person who trains can set: one frozen dataclass a TOML table.

Each field carries its help text as metadata; the commented file of ``turret train init`` and the
reference in ``docs/training.md`` are made from it. ``None`` means *chosen for you*: by the method
(``training/methods``) or the machine; ``turret train plan`` shows what was chosen.
``__post_init__`` raises a :class:`ConfigError` that names the key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from turret.server.basics.closest import did_you_mean
from turret.training.errors import ConfigError

# The methods of ``training/methods``; a test compares. Here, so that a wrong name is refused before
# torch is loaded.
METHOD_NAMES = (
    *("lora", "rslora", "dora", "alora", "miss", "oft", "hra", "vblora", "shira"),
    *("loha", "lokr", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "learned_fusion"),
)


def _key(help: str, default: Any = dataclasses.MISSING, *, chosen: str = "", sample: Any = None):
    """A field with its help, who chooses where it is left out, and a value to show as a sample."""
    return field(default=default, metadata={"help": help, "chosen": chosen, "sample": sample})


def _check(key: str, ok: bool, problem: str) -> None:
    if not ok:
        raise ConfigError.of(key, problem)


def _check_at_least(table: str, config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(f"{table}.{name}", value is None or value >= least, f"must be at least {least:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """The model that is trained on; its weights never change."""

    model: str | None = _key(
        "directory of a Hugging Face checkpoint, org/name[@revision] of the hub, or a .gguf file",
        None,
        chosen="the embedded SmolLM2-135M-Instruct",
        sample="models/Qwen2.5-0.5B-Instruct",
    )
    weights: Literal["nf4", "nf4-dense", "full"] | None = _key(
        "nf4: 4-bit, double quantised, as the server holds them (QLoRA); nf4-dense: the same "
        "values, dequantised once (faster, as large as the checkpoint); full: the checkpoint's own",
        None,
        chosen="nf4, which every method can train on",
        sample="nf4",
    )
    dtype: Literal["bfloat16", "float32"] | None = _key(
        "of the base's activations; what is trained is always float32",
        None,
        chosen="bfloat16 where the device computes in it, else float32",
        sample="bfloat16",
    )
    device: Literal["cpu", "cuda"] | None = _key(
        "where to train", None, chosen="cuda if there is one", sample="cpu"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """The kind of adapter. Keys without meaning for the method are refused."""

    name: str = _key(f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}", "lora")
    targets: tuple[str, ...] | None = _key(
        'linear modules to adapt: one preset (["attention"], ["mlp"], ["all-linear"]) or module '
        "names",
        None,
        chosen="by method",
        sample=("all-linear",),
    )
    rank: int | None = _key("size of the update's factors", None, chosen="by method", sample=8)
    alpha: float | None = _key(
        "the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))",
        None,
        chosen="by method",
        sample=16.0,
    )
    dropout: float | None = _key(
        "share of the adapter's inputs to drop while training",
        None,
        chosen="0",
        sample=0.05,
    )
    decompose_both: bool | None = _key(
        "LoKr: factorise the small factor too", None, chosen="false", sample=True
    )
    decompose_factor: int | None = _key(
        "LoKr: size of the small factor; -1 takes the squarest one", None, chosen="-1", sample=8
    )
    num_virtual_tokens: int | None = _key(
        "length of the learned prompt or prefix", None, chosen="by method", sample=16
    )
    prefix_projection: bool | None = _key(
        "prefix tuning: learn the prefix through a two-layer network, which is folded away when "
        "saved",
        None,
        chosen="true",
        sample=False,
    )
    encoder_hidden_size: int | None = _key(
        "width of the network that makes a prefix (projected) or a p-tuning prompt",
        None,
        chosen="by method",
        sample=256,
    )
    init_text: str | None = _key(
        "prompt tuning: start from the embeddings of this text, repeated or cut to length",
        None,
        chosen="random embeddings",
        sample="Answer with one word.",
    )
    invocation: str | None = _key(
        "aLoRA: every prompt holds this text, and the adapter acts from its last place on",
        None,
        chosen="what the chat template writes before an answer",
        sample="<|im_start|>assistant\n",
    )
    components: tuple[str, ...] | None = _key(
        "learned fusion: the adapters to fuse, each a directory or NAME=DIRECTORY",
        None,
        chosen="required there",
        sample=("json=adapters/json", "sql=adapters/sql"),
    )
    d_k: int | None = _key(
        "learned fusion: width of queries and keys", None, chosen="by method", sample=8
    )
    guidance: float | None = _key(
        "learned fusion: weight of the penalty on gates that leave the component which answers an "
        "example best by itself; 0 for none",
        None,
        chosen="by method",
        sample=0.5,
    )

    def __post_init__(self) -> None:
        if self.name not in METHOD_NAMES:
            # p-tuning, P_Tuning and the like are the same word.
            plain = self.name.lower().replace("-", "_")
            meant = did_you_mean(plain, METHOD_NAMES)
            if plain in METHOD_NAMES:
                meant = f"; did you mean {plain!r}?"
            problem = f"{self.name!r:.60} is none of {', '.join(METHOD_NAMES)}{meant}"
            raise ConfigError.of("method.name", problem)
        sizes = ("rank", "num_virtual_tokens", "encoder_hidden_size", "d_k")
        _check_at_least("method", self, 1, *sizes)
        _check("method.alpha", self.alpha is None or self.alpha > 0, "must be more than 0")
        _check("method.dropout", self.dropout is None or 0 <= self.dropout < 1, "must be in [0, 1)")
        _check("method.guidance", (self.guidance or 0) >= 0, "must be at least 0")
        for name in ("targets", "invocation"):
            value = getattr(self, name)
            _check(f"method.{name}", value is None or len(value) > 0, "must not be empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """JSONL files, one object a line: ``messages``, or ``prompt`` and ``completion``, or ``text``.

    Paths are relative to the config file.
    """

    train: str = _key("examples to learn from", sample="train.jsonl")
    validation: str | None = _key(
        "examples to validate on, disjoint from train",
        None,
        chosen="validation_fraction of train",
        sample="validation.jsonl",
    )
    validation_fraction: float = _key(
        "share of train set aside where validation is not given; 0 validates nothing", 0.1
    )
    task: Literal["generation", "classification"] = _key(
        "generation: completions are texts to learn; classification: they are labels (or lines "
        "have labels in their place), and the adapter gets a head that tells them apart (SEQ_CLS, "
        "for Classify)",
        "generation",
    )
    max_length: int = _key("most tokens of an example, and of a packed row", 512)
    too_long: Literal["drop", "truncate", "error"] = _key(
        "what happens to an example over max_length; drop tells how many", "drop"
    )
    template: Literal["auto", "chat", "none"] = _key(
        "prompt and completion become a chat turn (chat), stay as they are (none), or a chat turn "
        "where the model has a chat template (auto)",
        "auto",
    )
    loss_on: Literal["completion", "all"] = _key(
        "tokens to learn: completions and assistants' turns, or prompts as well", "completion"
    )
    packing: bool = _key("put several examples into a row; they do not attend to each other", False)

    def __post_init__(self) -> None:
        _check("data.train", bool(self.train), "is required")
        fraction = self.validation_fraction
        _check("data.validation_fraction", 0 <= fraction < 1, "must be in [0, 1)")
        _check_at_least("data", self, 2, "max_length")
        is_plain = self.task == "generation" or self.loss_on == "completion"
        _check("data.loss_on", is_plain, "must be completion: labels are learned")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to 0."""

    name: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = _key(
        "adamw8bit: bitsandbytes' 8-bit states; paged: they move to host memory when the GPU is "
        "full (CUDA only; adamw8bit elsewhere)",
        "adamw",
    )
    learning_rate: float | None = _key(
        "peak of the schedule", None, chosen="by method", sample=1e-3
    )
    lora_plus_ratio: float | None = _key(
        "LoRA+: the rate of B is this many times the rate of A",
        None,
        chosen="1",
        sample=16.0,
    )
    weight_decay: float = _key("of AdamW", 0.0)
    beta1: float = _key("of AdamW", 0.9)
    beta2: float = _key("of AdamW", 0.999)
    warmup_fraction: float = _key("share of the steps over which the rate rises", 0.1)
    max_grad_norm: float = _key("gradients are scaled down to this norm; 0 never does", 1.0)

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _check("optimizer.learning_rate", rate is None or rate > 0, "must be more than 0")
        _check_at_least("optimizer", self, 1, "lora_plus_ratio")
        _check_at_least("optimizer", self, 0, "weight_decay", "max_grad_norm")
        for name in ("beta1", "beta2", "warmup_fraction"):
            _check(f"optimizer.{name}", 0 <= getattr(self, name) < 1, "must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long, how much at once, and what is written."""

    output: str = _key(
        "directory of the run, relative to the config file; its adapter/ is the result", "run"
    )
    epochs: float = _key("passes over the training data; where steps is given, what they make", 3.0)
    steps: int | None = _key("optimizer steps", None, chosen="from epochs", sample=200)
    batch_size: int = _key("examples (or packed rows) in one pass through the model", 8)
    gradient_accumulation: int = _key("passes per optimizer step", 1)
    gradient_checkpointing: bool = _key(
        "compute each layer's activations twice instead of keeping them", False
    )
    seed: int = _key("of weights, data order and dropout", 0)
    validate_every: int = _key("steps between validations; the last step always validates", 50)
    checkpoint_every: int = _key("steps between checkpoints; 0 writes none", 50)
    keep_checkpoints: int = _key("checkpoints kept, newest first", 2)
    samples: int = _key(
        "validation prompts answered at the end, by the base and by the adapter, for the report", 3
    )
    report_to: Literal["none", "tensorboard"] = _key(
        "tensorboard: also write the metrics as TensorBoard events, in tensorboard/ of the run",
        "none",
    )
    adapter_dtype: Literal["float16", "bfloat16", "float32"] = _key(
        "of the saved adapter's tensors", "float16"
    )

    def __post_init__(self) -> None:
        _check("run.output", bool(self.output), "is required")
        _check("run.epochs", self.epochs > 0, "must be more than 0")
        at_least_one = ("steps", "batch_size", "gradient_accumulation", "validate_every")
        _check_at_least("run", self, 1, *at_least_one, "keep_checkpoints")
        _check_at_least("run", self, 0, "checkpoint_every", "seed", "samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The whole file."""

    base: BaseConfig
    method: MethodConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
