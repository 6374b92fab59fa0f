"""The errors of training, and their sentences by reason; ``turret train`` prints each on one line.

TrainingError
├── ConfigError    an invalid key of the config: unknown, out of range, or unsupported by the method
│   └── ConfigFileError  an error in the file alone, independent of the base and the machine
├── DataError      an invalid example: names the file, the line and the field
└── RunError       any other failure, such as a run directory that is finished or in use
"""

from __future__ import annotations

from pathlib import Path

from turret.clients import words as clients
from turret.server import words as server
from turret.server.basics.settings import Violation
from turret.words import Text as Text
from turret.words import sayer

_TRAINED_BASE = (
    "pass the base that the adapter was trained on, with the --dtype and --device used in training"
)

TEXTS = {
    # The config and its values.
    "NO_CONFIG": "{path} does not exist; `turret train init` writes one",
    "NOT_KEY_VALUE": "must be TABLE.KEY=VALUE, not {value!q}",
    "LABELS_ARE_LEARNED": 'must be "completion" for classification, which learns only the labels',
    "ENTRIES_NOT_IN_RANGE": "must have {least} to {most} entries, not {found}",
    "ONE_VALUE_ONLY": "must have only one value, because a sweep writes each variant to a"
    " subdirectory of it",
    # Settings that do not go together.
    "VALUE_UNSUPPORTED_BY": "{value} is not supported by {method}",
    "KEY_UNSUPPORTED_BY": "is not supported by {method}, which has only {choices}",
    "ODD_RANK": "must be even for hra, not {value}",
    "RANK_TOO_HIGH": "must be at most {most}, the limit of {method} on {module}, not {value}",
    "EXCEEDS_CONTEXT": "must be at most {most}, the context length of the model, not {value}",
    "IS_TRAINING_FILE": "{path} is also data.train; omit this setting to hold out"
    " data.validation_fraction of the examples",
    "VALIDATION_EMPTY": "holds out 0 of {found!n:example} in {path}, but a sweep compares"
    " validation losses; set data.validation, or set this fraction above 0 and provide at"
    " least two examples",
    "SAME_COMPONENT_NAME": "two components have the same name; write NAME=DIRECTORY",
    # Modules.
    "PRESET_NOT_ALONE": "{value!q} cannot be combined with other targets",
    "UNKNOWN_TARGET": "unknown module {value!q:.60}; {model_type} has {choices}, and the presets"
    " are {presets}",
    "NO_TARGETS": '{value!q} selects no trainable module of {model_type}; use "attention"',
    "EXPERTS_UNSUPPORTED_BY": "{module} belongs to experts, which {method} cannot train; use"
    ' "attention", or one of the methods {choices}',
    "FUSION_OF_EXPERTS": "learned_fusion does not support models with experts",
    # The base.
    "EXPERTS_NEED_NF4": "must be nf4 or nf4-dense for a mixture of experts",
    "GGUF_NEEDS_NF4": "must be nf4 or nf4-dense for a GGUF file",
    "TEXT_PART_NEEDS_NF4": "must be nf4 for the text part of a multimodal model",
    "WEIGHTS_ARE_QUANTIZED": "must be nf4 or nf4-dense, because the weights in {path} are"
    " quantised",
    "NO_TEXT_MODEL": "transformers has no text-only class for {model_type}",
    # Examples.
    "LABEL_COUNT": "{path} has {found!n:distinct label}; the number must be from {least} to {most}",
    "LABELS_NEED_CLASSIFICATION": 'requires data.task = "classification"',
    "NO_LABEL": "has no label; classification needs prompt and completion",
    "UNKNOWN_LABEL": "the label {value!q:.60} is not in the training file",
    "ALSO_IN_TRAINING": "is the same as line {line} of the training file",
    "TOO_MANY_TOKENS": "has {found} tokens, more than data.max_length ({most})",
    "NOTHING_TO_LEARN": "has no tokens to learn",
    "ALL_TOO_LONG": "{path}: every example is longer than data.max_length ({most}); the shortest"
    " has {found} tokens",
    "NEEDS_CHAT_TEMPLATE": "requires a chat template, which this model lacks; use prompt and"
    " completion",
    "TEMPLATE_REWRITES": "makes the chat template render the text before it differently",
    "INVOCATION_MISSING": "does not contain the invocation {value!q:.60} before the last answer",
    "INVOCATION_SPLIT": "contains the invocation {value!q:.60}, but the tokenizer merges its ends"
    " with the text around it, so its tokens {tokens} do not occur; choose a method.invocation that"
    " starts and ends with special tokens or line breaks",
    "INVOCATION_REQUIRED": "is required, because the chat template writes no text before an answer",
    # Runs.
    "OUTPUT_UNUSABLE": "{path} {problem}; choose another --output",
    "OUTPUT_NOT_EMPTY": "{path} is not empty and contains no run; choose another --output",
    "OUTPUT_IS_A_RUN": "{path} contains a run, not a sweep; choose another --output",
    "RUN_FINISHED": "{path} contains a finished run; pass --overwrite to train again",
    "RUN_WITHOUT_REPORT": "{path} contains a finished run without its report; `{command}` writes"
    " the report, and --overwrite trains again",
    "RUN_UNFINISHED": "{path} contains an unfinished run; pass --resume to continue it or"
    " --overwrite to start again",
    "NO_RUN_TO_RESUME": "{path} contains no run; omit --resume to start one",
    "RUN_IN_USE": "another `turret train` uses {path}; wait until it ends, or choose another"
    " --output",
    "RUN_DIFFERS": "{path} cannot be resumed: {found}; choose another --output to start a new run",
    "RUN_SETTINGS_DIFFER": "{path} cannot be resumed: {found}; `{command}` resumes it with its own"
    " settings, and another --output starts a new run",
    "DIFFERENCE": "{key} was {before} and is now {after}",
    "DIGEST_CHANGED": "{key} has changed",
    "EXAMPLES_CHANGED": "the examples have changed (data.digest)",
    "NOT_A_RUN": "{path} is not a run of `turret train`: {why}",
    "NO_RUN_FACTS": "{path} is not a run of `turret train`, because it has no {name}; pass the"
    " directory that run.output sets",
    "RUN_DISK_FULL": "the disk of {path} has {free!b} free, but the run needs {needed!b}; free some"
    " space or choose another --output",
    "LOSS_NOT_FINITE": "the loss of step {step} is {loss}; lower optimizer.learning_rate",
    "WEIGHT_NOT_FINITE": "{name} is not finite in {dtype}; lower optimizer.learning_rate",
    "REHEARSAL_KILLED": "the process that measures memory was killed, perhaps because memory ran"
    " out; lower run.batch_size or data.max_length",
    "REHEARSAL_FAILED": "the process that measures memory failed: {problem:.500}",
    "OTHER_BASE_SERVED": "the server's weights of {served} differ from those of {name}; set"
    " base.model to the server's model",
    "SERVER_DOES_NOT_TRAIN": "the server at {address} does not offer training; start it with"
    " `turret serve --training --state-dir DIR`",
    "RUN_ELSEWHERE": "the run in {path} was started {how} --server; `{command}` continues it",
    "NO_VALIDATION_LOSS": "{path} has no validation loss",
    # Repair adapters.
    "NOTHING_TO_REPAIR": "the 4-bit weights in {path} are served as stored, so there is nothing to"
    " repair; pass the model that they were made from",
    # Verification of a server.
    "NO_PROMPTS": "{path} has no prompts; write one per line",
    "SERVER_UNREACHED": "{url} cannot be reached: {problem}",
    "SERVER_REFUSED": "{url} answered {status}: {text}",
    "NO_MODEL_LIST": "{url} has no list of models at /v1/models",
    "NO_BASE_LISTED": "{url} lists no base model at /v1/models",
    "NO_LOGPROBS": "{url} answers without log probabilities, which the comparison needs",
    "NOT_ON_SERVER": "the server has not loaded {names}; it has {choices}",
    "OTHER_WEIGHTS_SERVED": "the weights that {url} serves differ from those of {name}; pass the"
    " server's base with --model",
    # Conversions.
    "NOT_PEFT_FOLDER": "{path} has no {file}; pass the directory that PEFT's save_pretrained wrote",
    "NOT_CONVERTED": "{path}: peft_type {value!q:.60} cannot be converted; supported types are"
    " {choices}",
    "NEEDS_BASE": "{method} requires --base, the model that the adapter was trained on",
    "BASE_IS_GGUF": "{path} is a GGUF file; pass the checkpoint that the adapter was trained on",
    "BASE_NOT_FOUND": "{path} does not exist; pass the directory of the base model or its hub id,"
    " org/name",
    "BASE_IS_4BIT": "{path} is 4-bit; pass the 16-bit or 32-bit checkpoint that the adapter was"
    " trained on",
    "TENSOR_QUANTIZED": "{name} has dtype {dtype}, so the model is quantised; pass the 16-bit or"
    " 32-bit checkpoint that the adapter was trained on",
    "LORA_COUNT": "the adapter consists of {expected} LoRAs; pass --lora once for each, not {found}"
    " times",
    "XLORA_NO_LORAS": "adapter_config.json: adapters must map the number of each LoRA to its"
    " directory",
    "XLORA_NAME": "adapter_config.json: adapters has the key {value!q:.60}, but its keys must be"
    " consecutive numbers from 0",
    "XLORA_NUMBERS": "xlora_depth must be an integer from 1 to 64, and xlora_dropout_p a number",
    "XLORA_NO_CLASSIFIER": "{name} is neither in {path} nor in a LoRA's directory below it;"
    " convert the whole directory that PEFT wrote",
    "XLORA_TRAINED_LORAS": "LoRA {number} was trained too (use_trainable_adapters), but PEFT 0.20"
    " and later do not save all of its layers; save the adapter with PEFT 0.19",
    "XLORA_NO_ORIGINAL": "cannot read the original of LoRA {number}: {path} is not an adapter;"
    " pass the original LoRAs in order, each with --lora",
    "XLORA_OTHER_LORA": "{path} is not the original of LoRA {number}: {name} differs",
    "ADAMSS_CLUSTERS": "{name}: the base gives clusters of {expected} rows, but the file has"
    f" {{found}}; {_TRAINED_BASE}",
    "ADAMSS_OTHER_WEIGHT": f"{{path}}: adamss_newB does not match the base's weight;"
    f" {_TRAINED_BASE}",
}

say = sayer(clients.TEXTS, server.TEXTS, TEXTS)


class TrainingError(Exception):
    """The base class of these errors. The message is readable on its own."""


class ConfigError(TrainingError):
    """Invalid keys of the config.

    Attributes:
        violations: The faults, each with its key.
        path: The file, if the fault is in the file alone.
    """

    def __init__(self, *violations: Violation, path: Path | None = None) -> None:
        where = "" if path is None else f"{path}: "
        lines = [f"{key}: {text}" if key else text for key, text in violations]
        super().__init__("\n".join(f"{where}{line}" for line in lines))
        self.violations = violations
        self.path = path

    @classmethod
    def of(cls, key: str, problem: Text) -> ConfigError:
        """The error for one invalid key."""
        return cls(Violation(key, problem))


class ConfigFileError(ConfigError):
    """An error in the config that does not depend on the base or the machine."""


class DataError(TrainingError):
    """An invalid example; names file, line and field: ``train.jsonl:7: messages[2].role: …``.

    Attributes:
        problem: The fault.
    """

    def __init__(self, problem: Text, place: str = "") -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.problem = problem

    @classmethod
    def of(cls, path: Path, line: int, field: str | None, problem: Text) -> DataError:
        """The error for one invalid field of an example, or for the whole example."""
        return cls(problem, f"{path}:{line}: {field}" if field else f"{path}:{line}")


class RunError(TrainingError):
    """Any other failure: of a run and its directory, a conversion, a repair or a verification."""

    def __init__(self, text: Text) -> None:
        super().__init__(text)
