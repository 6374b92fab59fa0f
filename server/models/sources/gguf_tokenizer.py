"""The tokenizer of a GGUF file, with its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.server.models.sources.gguf_header import refuse

if TYPE_CHECKING:
    from turret.server.models.sources.gguf_layouts import GgufLayout

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
