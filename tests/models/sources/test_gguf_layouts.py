"""A typical GGUF file: K-quants by kind of tensor, and a SentencePiece vocabulary."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from builders.bases.gguf_files import finish, gguf_writer
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GgufConfig

from turret.server.models.loader import eos_token_ids, load_decoder
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.tokenizer import Tokenizer

HIDDEN, INNER, HEADS, KV_HEADS = 256, 512, 4, 2
# The beginning of Llama 2's and Mistral 7B's vocabularies, some letters, and words by rank.
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"dehlorw!"]
WORDS = ["he", "ll", "hell", "hello", "▁hello", "wo", "rl", "worl", "world", "▁world"]
TOKENS = [*SPECIAL, *BYTES, *LETTERS, *WORDS]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# llama.cpp's mixtures of kinds, and one of each other kind in its files.
KINDS = {
    "token_embd": ((len(TOKENS), HIDDEN), Kind.Q4_K),
    "output": ((len(TOKENS), HIDDEN), Kind.Q6_K),
    "output_norm": ((HIDDEN,), Kind.F32),
    "blk.0.attn_q": ((HIDDEN, HIDDEN), Kind.Q4_K),
    "blk.0.attn_k": ((HIDDEN // 2, HIDDEN), Kind.Q5_K),
    "blk.0.attn_v": ((HIDDEN // 2, HIDDEN), Kind.Q6_K),
    "blk.0.attn_output": ((HIDDEN, HIDDEN), Kind.Q3_K),
    "blk.0.attn_norm": ((HIDDEN,), Kind.F32),
    "blk.0.ffn_gate": ((INNER, HIDDEN), Kind.Q2_K),
    "blk.0.ffn_up": ((INNER, HIDDEN), Kind.IQ4_XS),
    "blk.0.ffn_down": ((HIDDEN, INNER), Kind.BF16),
    "blk.0.ffn_norm": ((HIDDEN,), Kind.F32),
}
# The bytes of a block that are part of a float, by kind; random bytes might be NaN.
SCALES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_XS: (0,),
}


def packed(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a kind."""
    if kind not in SCALES:
        values = rng.standard_normal(shape).astype(np.float32)
        return values if kind == Kind.F32 else gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = shape
    found = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        found[:, :, place : place + 2] = np.array([0.001], np.float16).view(np.uint8)
    return found.reshape(rows, -1)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.Q4_K_M.gguf"
    ranks = [-float(rank) for rank in range(len(LETTERS) + len(WORDS))]
    writer = gguf_writer(
        path,
        "llama",
        name="Tiny",
        file_type=15,
        quantization_version=2,
        context_length=2048,
        embedding_length=HIDDEN,
        block_count=1,
        feed_forward_length=INNER,
        head_count=HEADS,
        head_count_kv=KV_HEADS,
        layer_norm_rms_eps=1e-5,
        rope_dimension_count=HIDDEN // HEADS,
        rope_freq_base=10000.0,
        vocab_size=len(TOKENS),
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_list=TOKENS,
        token_scores=[0.0] * (len(SPECIAL) + len(BYTES)) + ranks,
        token_types=[UNKNOWN, CONTROL, CONTROL] + [BYTE] * len(BYTES) + [NORMAL] * len(ranks),
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        add_bos_token=True,
        add_eos_token=False,
    )
    rng = np.random.default_rng(0)
    for name, (shape, kind) in KINDS.items():
        raw = None if kind == Kind.F32 else kind
        writer.add_tensor(f"{name}.weight", packed(shape, kind, rng), raw_dtype=raw)
    finish(writer)
    return path


def test_every_kind_of_weight_matches_transformers(file: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    ours = dict(open_gguf(file).tensors)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.std() > 0, name
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=0, atol=1e-6)


def test_the_vocabulary_matches_sentencepiece(file: Path) -> None:
    source = resolve_model(file, default_cache_dir())
    decoder = load_decoder(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (decoder.arch.num_kv_heads, decoder.arch.tie_word_embeddings) == (KV_HEADS, False)
    ends = eos_token_ids(source.files)
    tokenizer = Tokenizer.load(source.files, ends, len(TOKENS))
    assert ends == {2}
    for text, words in (
        ("hello world", ["<s>", "▁hello", "▁world"]),
        ("hello  world", ["<s>", "▁hello", "▁", "▁world"]),
        # A letter that is in no token is encoded as bytes.
        ("é!", ["<s>", "▁", "<0xC3>", "<0xA9>", "!"]),
    ):
        ids = tokenizer.encode(text)
        assert [TOKENS[token] for token in ids] == words
        assert tokenizer.decode(ids) == text
