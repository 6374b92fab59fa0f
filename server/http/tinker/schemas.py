"""The JSON bodies of the Tinker API.

Fields for the hosted service alone, such as projects, are ignored like unknown ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from turret.server.api import limits
from turret.server.api.checkpoints import MAX_TTL_SECONDS
from turret.server.http.fields import (
    Body,
    TokenIds,
    are_token_ids,
    ignored,
    unsupported,
    wrong_at,
    wrong_type,
)
from turret.server.http.tinker.wire import MAX_CHUNKS
from turret.server.training import ADAM_RANGES
from turret.server.words import say

MAX_SAMPLES = 128
MAX_ID_CHARS = 128
MAX_PATH_CHARS = 256
# Limits of ``user_metadata``. A list of checkpoints contains it for up to 256 of them.
MAX_NOTES, MAX_KEY_CHARS, MAX_NOTE_CHARS = 16, 64, 512
_MOST_NUMBER = (1 << 31) - 1
_MOST_SEED = (1 << 63) - 1

Id = Annotated[str, Field(max_length=MAX_ID_CHARS)]
Path = Annotated[str, Field(max_length=MAX_PATH_CHARS)]
Number = Annotated[int, Field(ge=0, le=_MOST_NUMBER)]
Seconds = Annotated[int, Field(ge=1, le=MAX_TTL_SECONDS)]
_Key = Annotated[str, Field(max_length=MAX_KEY_CHARS)]
_Note = Annotated[str, Field(max_length=MAX_NOTE_CHARS)]
Notes = Annotated[dict[_Key, _Note], Field(max_length=MAX_NOTES)]


class Anything(Body):
    """An object whose fields do not matter."""


class Typed(Body):
    """A body that may state its type."""

    type: Any = ignored()


class OfSession(Typed):
    """A body that names a session."""

    session_id: Id


class LoraConfig(Body):
    """The config of an adapter."""

    rank: int = Field(ge=1, le=1 << 16)
    seed: int | None = Field(None, ge=-_MOST_SEED, le=_MOST_SEED)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """The optimizer of a model."""

    type: Literal["adamw"] = "adamw"


class CreateModel(OfSession):
    """POST /api/v1/create_model."""

    model_seq_id: Number
    base_model: Path
    lora_config: LoraConfig
    user_metadata: Notes = Field({})
    optimizer_config: Optimizer = Optimizer()


class OfModel(Typed):
    """A body that names a model."""

    model_id: Id


def _adam(name: str, default: float) -> Any:
    least, most = ADAM_RANGES[name]
    return Field(default, ge=least, le=most)


class AdamParams(Body):
    """One step of AdamW."""

    learning_rate: float = _adam("learning_rate", 0.0001)
    beta1: float = _adam("beta1", 0.9)
    beta2: float = _adam("beta2", 0.95)
    eps: float = _adam("eps", 1e-12)
    weight_decay: float = _adam("weight_decay", 0.0)
    grad_clip_norm: float = _adam("grad_clip_norm", 0.0)


class OptimStep(OfModel):
    """POST /api/v1/optim_step."""

    seq_id: Number
    adam_params: AdamParams
    # Settings of optimizers other than AdamW.
    optimizer_params: Any = unsupported()


class Save(OfModel):
    """A body that saves weights."""

    seq_id: Number
    path: Path | None = None
    ttl_seconds: Seconds | None = None
    user_metadata: Notes = Field({})


class SaveWeights(Save):
    """POST /api/v1/save_weights."""

    overwrite: bool = False


class SaveExternal(Save):
    """POST /api/v1/save_weights_external."""

    path: Path  # type: ignore[assignment]
    age_encryption_recipients: Any = unsupported([])


class SaveForSampler(Save):
    """POST /api/v1/save_weights_for_sampler."""

    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class LoadWeights(Typed):
    """POST /api/v1/load_weights: into a model, or into a new one of a session."""

    path: Path
    optimizer: bool
    model_id: Id | None = None
    seq_id: Number | None = None
    session_id: Id | None = None
    model_seq_id: Number | None = None
    base_model: Path | None = None
    user_metadata: Notes = Field({})
    optimizer_config: Optimizer = Optimizer()
    # Access to checkpoints of other accounts.
    weights_access_token: Any = unsupported("")


class CreateSampler(OfSession):
    """POST /api/v1/create_sampling_session."""

    sampling_session_seq_id: Number
    base_model: Path | None = None
    model_path: Path | None = None


class Chunk(Body):
    """A part of a prompt."""

    type: Literal["encoded_text"]
    tokens: TokenIds


class Prompt(Body):
    """A prompt in parts."""

    chunks: list[Chunk] = Field(max_length=MAX_CHUNKS)


@dataclass(frozen=True, slots=True)
class Stop:
    """The conditions that end a sequence, other than its length.

    Attributes:
        texts: Texts that end the sequence.
        tokens: Tokens that end the sequence.
        ignores_eos: Whether the sequence continues after the model's end tokens.
    """

    texts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    ignores_eos: bool = False


def _stop(value: Any) -> Stop:
    """Read a text, or a list of texts or tokens. An empty list disables even the end tokens."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise wrong_at(wrong_type("a string, or a list of strings or token ids", value))
    is_text = bool(value) and isinstance(value[0], str)
    most = limits.MAX_STOP_STRINGS if is_text else limits.MAX_STOP_TOKEN_IDS
    if len(value) > most:
        raise wrong_at(say("TOO_MANY_ENTRIES", most=most, found=len(value)))
    if not is_text and are_token_ids(value):
        return Stop(tokens=tuple(value), ignores_eos=not value)
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise wrong_at(wrong_type("a string or a token id", text), index)
        if not text:
            raise wrong_at(say("EMPTY"), index)
        if len(text) > (longest := limits.MAX_STOP_STRING_CHARS):
            raise wrong_at(say("TOO_MANY_CHARACTERS", most=longest, found=len(text)), index)
    return Stop(texts=tuple(value))


class SamplingParams(Body):
    """How tokens are drawn."""

    max_tokens: int | None = Field(None, ge=1, le=_MOST_NUMBER)
    seed: int | None = Field(None, ge=-_MOST_SEED, le=_MOST_SEED)
    stop: Annotated[Stop, PlainValidator(_stop)] = Stop()
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(-1, ge=-1, le=_MOST_NUMBER)
    top_p: float = Field(1.0, gt=0, le=1)


class Sample(Typed):
    """POST /api/v1/asample."""

    sampling_session_id: Id
    # A clone of a sampling client numbers its requests from a multiple of a billion, so the maximum
    # is higher than for other numbers.
    seq_id: int = Field(ge=0, le=_MOST_SEED)
    prompt: Prompt
    sampling_params: SamplingParams
    num_samples: int = Field(1, ge=1, le=MAX_SAMPLES)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(0, ge=0, le=limits.MAX_TOP_LOGPROBS)
    topk_sample_logprobs: int = Field(0, ge=0, le=limits.MAX_TOP_LOGPROBS)
    prompt_logprobs_last_n: int | None = Field(None, ge=1, le=_MOST_NUMBER)
    target_prompt_logprobs: Any = unsupported()
    prompt_alt_tokens_k: Any = unsupported(0)
    record_stability_info: Any = unsupported(False)
    base_model: Any = unsupported(instead="sampling_session_id")
    model_path: Any = unsupported(instead="sampling_session_id")


class OfRequest(Body):
    """POST /api/v1/retrieve_future and /api/v1/cancel_future."""

    request_id: Annotated[str, Field(max_length=2 * MAX_ID_CHARS)]
    allow_metadata_only: Any = ignored()


class OfPath(Body):
    """POST /api/v1/weights_info."""

    tinker_path: Path


class Ttl(Body):
    """PUT …/ttl: when a checkpoint is removed; null for never."""

    ttl_seconds: Seconds | None = None
