"""A model in a GGUF file: its config, its tokenizer, and its weights, dequantised one at a time.

Every key about the architecture is used or refused, and every tensor is used: what a file says that
nobody reads would make another function of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turret.server.models.sources.gguf_header import ARCHITECTURES, check_gguf, refuse

if TYPE_CHECKING:
    # Not at run time: it takes its time, and most models are no GGUF files.
    from gguf import GGUFReader, ReaderTensor

_IGNORED_TENSORS = ("rope_freqs.weight",)
# Llama 3.1 and 3.2 as released (arXiv 2407.21783): llama.cpp stores the factors that these make,
# and not what they are made of.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)
# Keys of an architecture that say nothing of their own.
_REDUNDANT = frozenset(
    {
        *("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"),
        *("rope.scaling.type", "rope.scaling.finetuned", "rope.scaling.original_context_length"),
        *("rope.scaling.factor", "attention.head_count_kv", "rope.freq_base"),
    }
)
# The rules of splitting whose texts begin with a BOS where a file does not say (llama.cpp's own).
_PRE = "tokenizer.ggml.pre"
_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Whose converter puts the rows of queries and keys in the order of interleaved rotation.
_PERMUTED = frozenset({ARCHITECTURES["llama"]})


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as transformers would have it.

    Attributes:
        config: A transformers config.
        tokenizer: With the file's chat template.
        eos_token_ids: All that end an answer.
        num_tensors: How many ``tensors`` yields.
    """

    config: Any
    tokenizer: Any
    eos_token_ids: list[int]
    num_tensors: int
    _reader: GGUFReader

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 values of each weight, as Hugging Face's checkpoints have them."""
        import gguf

        for tensor in self._reader.tensors:
            name = _hf_name(tensor.name)
            if name is None:
                continue
            values = torch.from_numpy(
                np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            )
            if self.config.model_type in _PERMUTED:
                values = _unpermuted(name, values, self.config)
            yield name, values


def open_gguf(path: Path) -> GgufModel:
    """Read what a file says of itself.

    Raises:
        InvalidRequestError: It is damaged, or says what is not served.
    """
    import gguf
    from transformers import AutoTokenizer

    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise refuse(path, f"cannot be read: {error}") from None
    if fields.get("split.count", 1) > 1:
        raise refuse(path, "is one of several; join them: llama-gguf-split --merge")
    unknown = [t.name for t in reader.tensors if _hf_name(t.name, ignored=True) is None]
    if unknown:
        raise refuse(path, f"holds a tensor that nobody knows here: {unknown[0]}")
    config = _config(path, fields, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **_bos_rule(fields))
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    count = sum(_hf_name(tensor.name) is not None for tensor in reader.tensors)
    eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return GgufModel(config, tokenizer, eos, count, reader)


def _bos_rule(fields: Mapping[str, object]) -> dict[str, bool]:
    """Older files of Llama 3 and Mistral Nemo do not say that their texts begin with a BOS."""
    is_silent = "tokenizer.ggml.add_bos_token" not in fields
    return {"add_bos_token": True} if is_silent and fields.get(_PRE) in _WITH_BOS else {}


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> Any:
    from transformers import AutoConfig

    architecture = fields["general.architecture"]
    prefix = f"{architecture}."
    said = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    wanted = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    lacking = [f"{prefix}{key}" for key in wanted.values() if key not in said]
    odd = sorted(said.keys() - _REDUNDANT - set(wanted.values()))
    # What says that there is nothing of a kind.
    odd = [key for key in odd if not (key.startswith("expert_") and said[key] == 0)]
    if lacking or odd:
        what = (
            f"lacks {lacking[0]}" if lacking else f"says {prefix}{odd[0]}, which is not read here"
        )
        raise refuse(path, what)
    values: dict[str, Any] = {name: said[key] for name, key in wanted.items()}
    heads = values["num_attention_heads"]
    head_dim = said.get("attention.key_length", values["hidden_size"] // heads)
    if any(
        said.get(key, head_dim) != head_dim
        for key in ("attention.value_length", "rope.dimension_count")
    ):
        raise refuse(path, "rotates a part of each head, or has values of another width than keys")
    values |= {
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(path, said, head_dim, tensors.get("rope_freqs.weight")),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    return AutoConfig.for_model(ARCHITECTURES[architecture], **values)


def _rope(
    path: Path, said: Mapping[str, Any], head_dim: int, freqs: ReaderTensor | None
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(said.get("rope.freq_base", 10000.0))}
    kind = said.get("rope.scaling.type", "none")
    if freqs is not None:
        if kind != "none":
            raise refuse(path, f"scales its rotary positions by factors and by {kind!r} at once")
        return {**rope, **_llama3(path, rope["rope_theta"], head_dim, freqs)}
    if kind == "none":
        return {**rope, "rope_type": "default"}
    if kind not in ("linear", "yarn") or "rope.scaling.factor" not in said:
        raise refuse(path, f"scales its rotary positions by {kind!r}, which is not read here")
    rope |= {"rope_type": kind, "factor": float(said["rope.scaling.factor"])}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in said:
            raise refuse(path, "scales its rotary positions by yarn and lacks the original length")
        original = int(said["rope.scaling.original_context_length"])
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3(path: Path, theta: float, head_dim: int, freqs: ReaderTensor) -> dict[str, Any]:
    """What made the factors that llama.cpp divides the frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = torch.from_numpy(np.array(freqs.data, np.float32))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    for factor in _LLAMA3_FACTORS:
        rope = {**_LLAMA3, "factor": factor}
        config = LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters={**rope, "rope_theta": theta},
        )
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if found.shape == plain.shape and torch.allclose(plain / scaled, found, rtol=1e-3):
            return rope
    raise refuse(path, "scales its rotary positions by factors that are not Llama 3.1's or 3.2's")


def _hf_name(name: str, *, ignored: bool = False) -> str | None:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; None if it is none."""
    if ignored and name in _IGNORED_TENSORS:
        return name
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{kind}"
    block, _, rest = module.partition(".")
    number, _, part = rest.partition(".")
    if block != "blk" or not number.isdecimal() or part not in _MODULES:
        return None
    return f"model.layers.{number}.{_MODULES[part]}.{kind}"


def _unpermuted(name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of q and k of a Llama in Hugging Face's order.

    llama.cpp rotates neighbouring features and stores rows so (``permute`` in its
    convert_hf_to_gguf.py); transformers rotates a feature with the one half a head away.
    """
    for module, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if f".{module}." in name:
            rows = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
            return rows.transpose(1, 2).reshape(values.shape)
    return values
