"""What is said of files that are no adapter's, with what to do: at a start, and of a load."""

from __future__ import annotations

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory, refuse
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.source import CONFIG_FILE, TENSORS_FILE
from turret.server.basics.counted import counted

SAVE_AGAIN = "have PEFT save the adapter again"
COPY_AGAIN = f"copy the file again, or {SAVE_AGAIN}"
# Used where a config and its tensors contradict each other.
OTHER_TRAINING = (
    f"{CONFIG_FILE} may be of another training: take the one that was saved beside {TENSORS_FILE}"
)
# Used where no tensor belongs to the method.
NO_TENSORS = "holds no tensors of this method"
WHOLE_WEIGHT = "is a whole weight; only those of embed_tokens and lm_head are served"
LEFT_OUT = f"is there, but the config leaves it out; {OTHER_TRAINING}"
NOT_FINITE = "holds NaN or Inf; take a checkpoint from before that"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files of the trainer itself, which do not show in which format the weights are saved.
_TRAINERS_OWN = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
_MODEL_CONFIG = "config.json"


def lacks_switch(key: str) -> str:
    """The fault of a tensor that is only allowed if this key is set."""
    return f"is there, but {key} is not set"


def lacks_switched(key: str) -> str:
    """The fault of a missing tensor that this key requires."""
    return f"is missing; {key} is set"


def lacks_tokenizer(rows: int, base_rows: int) -> str:
    """The fault of an adapter with its own tokens but no tokenizer."""
    return (
        f"is missing: the adapter has rows for {counted(rows, 'token')}, the base model for"
        f" {base_rows}, and only its own tokenizer tells which they are; put it beside the weights"
        " (tokenizer.save_pretrained)"
    )


def holds_integers(method: str) -> str:
    """The fault of an integer tensor in a method that has none."""
    return f"holds integers, which {method} does not"


def check_is_adapter(directory: AdapterDirectory, path: str) -> None:
    """Refuse a directory that lacks one of an adapter's two files.

    Args:
        directory: Where to look; its other names show what it holds instead.
        path: The adapter's name in messages.

    Raises:
        AdapterCheckpointError: It does.
    """
    has_tensors = directory.has(TENSORS_FILE)
    if not directory.has(CONFIG_FILE):
        raise refuse(path, directory.holds_others(CONFIG_FILE) or _what_it_is(directory))
    if has_tensors:
        return  # other files beside the tensors are never opened
    findings = Findings(path)
    for name in directory.names():
        if name.endswith(_PICKLE_SUFFIXES) and not name.startswith(_TRAINERS_OWN):
            findings.add(
                name,
                "is a pickle, which can run code and is never read; PEFT's"
                f" save_pretrained(…, safe_serialization=True) writes {TENSORS_FILE}",
            )
    findings.raise_if_any()
    raise refuse(path, f"has {CONFIG_FILE}, but no {TENSORS_FILE}; {COPY_AGAIN}")


def _what_it_is(directory: AdapterDirectory) -> str:
    names = directory.names()
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return (
            f"is no adapter: {ggufs[0]} is a whole model, which `turret serve --model` takes; name"
            f" the directory with {CONFIG_FILE} that the training wrote"
        )
    has_weights = any(n.startswith("model") and ".safetensors" in n for n in names)
    if _MODEL_CONFIG in names and has_weights:
        return (
            "is a whole model, not an adapter: `turret serve --model` takes it. What was merged"
            f" into it is the directory with {CONFIG_FILE} that the training wrote"
        )
    return (
        f"is no adapter: there is no {CONFIG_FILE} in it; name the directory that PEFT's"
        " save_pretrained or `turret train` wrote"
    )
