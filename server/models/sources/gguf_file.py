"""A model in a GGUF file: its config, its tokenizer, and its weights, dequantised one at a time.

Every tensor is used or refused, as every key is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turret.server.models.sources.gguf_config import read_gguf_config
from turret.server.models.sources.gguf_header import check_gguf, check_whole, refuse
from turret.server.models.sources.gguf_tensors import GgufTensors

if TYPE_CHECKING:
    from turret.server.models.sources.gguf_layouts import GgufLayout


# The tokenizer of a GGUF file, with its chat template.

# Key for the pre-tokenizer, the rules by which a text is split before merging, by llama.cpp's
# names.
_PRE = "tokenizer.ggml.pre"
# Pre-tokenizers with a BOS before every text where the file does not say (llama.cpp's own rule).
_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")
# Pre-tokenizers that equal Llama 3's but that transformers does not know.
_AS_LLAMA3 = ("chatglm-bpe", "glm4")
# Splits letters, up to three digits, and other characters with line ends: GPT-4, Llama 3 and GLM-4.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers that transformers knows, and those equal to GPT-2's, its fallback. Some of the
# latter split digits, which makes no difference: none of their merges joins digits.
_KNOWN = frozenset(
    {
        *("dbrx", "falcon3", "falcon-h1", "llama3", "llama-bpe", "llama-v3", "midm-2.0", "pixtral"),
        *("smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez"),
        *("gpt-4o", "llama4", "kanana2"),
        *("default", "gpt-2", "granite-docling", "olmo", "refact", "smollm", "starcoder"),
        *_AS_LLAMA3,
    }
)


def read_gguf_tokenizer(path: Path, fields: Mapping[str, Any], layout: GgufLayout) -> Any:
    """A transformers tokenizer.

    Args:
        path: The file.
        fields: Its keys.
        layout: Of its architecture.

    Raises:
        InvalidRequestError: It splits texts in a way that is not read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pre = fields.get(_PRE, "default")
    is_bytes = fields.get("tokenizer.ggml.model") == "gpt2"
    if is_bytes and pre not in _KNOWN:
        raise refuse(path, "GGUF_TOKENIZER_UNSUPPORTED", pre=pre)
    kind: Any = AutoTokenizer if layout.tokenizer == "auto" else PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name, **_bos_rule(fields))
    if is_bytes and pre in _AS_LLAMA3:
        _split_as_llama3(tokenizer)
    return tokenizer


def _bos_rule(fields: Mapping[str, object]) -> dict[str, bool]:
    """Add the BOS rule that older files of Llama 3 and Mistral Nemo lack."""
    is_silent = "tokenizer.ggml.add_bos_token" not in fields
    return {"add_bos_token": True} if is_silent and fields.get(_PRE) in _WITH_BOS else {}


def _split_as_llama3(tokenizer: Any) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


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
    _tensors: GgufTensors

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 values of each weight, as Hugging Face's checkpoints have them."""
        return iter(self._tensors)


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file and read everything except the weights.

    Raises:
        InvalidRequestError: It is damaged, or says what is not served.
    """
    # Imported here because it is slow and most models are not GGUF files.
    import gguf

    check_gguf(path)
    check_whole(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise refuse(path, "GGUF_UNREADABLE", problem=error) from None
    if fields.get("split.count", 1) > 1:
        raise refuse(path, "GGUF_SPLIT")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in by_name:
        raise refuse(path, "TENSOR_MISSING", name="token_embd.weight")
    config, layout = read_gguf_config(path, fields, by_name)
    tensors = GgufTensors(path, by_name, layout, config)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return GgufModel(config, read_gguf_tokenizer(path, fields, layout), eos, len(tensors), tensors)
