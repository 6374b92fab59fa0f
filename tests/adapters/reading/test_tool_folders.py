"""Folders in the form that Unsloth, Axolotl and TRL write, which are loaded despite other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, edit_config, logits, lora_config, tiny_llama, with_operators
from builders.methods import load_adapter, save_adapter
from said import says

from turret.server.adapters.adapter import Source, origin_of
from turret.server.adapters.loader import AdapterLoader
from turret.server.errors import AdapterCheckpointError

# Files that transformers' Trainer writes alongside a checkpoint's adapter.
TRAINER = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md"),
)
UNSLOTH_MAPPING = {
    "base_model_class": "LlamaForCausalLM",
    "parent_library": "transformers.models.llama.modeling_llama",
    "unsloth_fixed": True,
}
READ = {
    "chat_template.jinja": b"{{ messages }}",
    "special_tokens_map.json": b'{"eos_token": {"content": "</s>", "lstrip": false}}',
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["a.b", null]}, "bos_token": null,'
    b' "chat_template": "{{ messages[0].content }}"}',
}
# Tool → folder, other files, keys of the config.
TOOLS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "unsloth": (
        "lora_model",
        ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"),
        {
            "base_model_name_or_path": "unsloth/Tiny-Llama-1B-unsloth-bnb-4bit",
            "auto_mapping": UNSLOTH_MAPPING,
            "lora_dropout": 0,
        },
    ),
    "unsloth-trainer": (
        "outputs/checkpoint-60",
        TRAINER,
        {
            "base_model_name_or_path": "unsloth/tiny-llama-1b-bnb-4bit",
            "auto_mapping": UNSLOTH_MAPPING,
        },
    ),
    "axolotl": (
        "outputs/lora-out",
        (*TRAINER, "config.json", "checkpoint-9/adapter_config.json", "debug.log"),
        {"base_model_name_or_path": "org/Tiny-Llama-1B", "lora_dropout": 0.05},
    ),
    "trl": (
        "out/checkpoint-500",
        (*TRAINER, "chat_template.jinja", "vocab.json", "merges.txt"),
        {"base_model_name_or_path": "/root/models/Tiny-Llama-1B", "auto_mapping": None},
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_output_folder_of_each_training_tool_loads_unchanged(tool: str, tmp_path: Path) -> None:
    path, beside, said = TOOLS[tool]
    model, folder = tiny_llama(), tmp_path / path
    # PEFT writes all keys of its config, whether they are set or not.
    config = lora_config(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(model, config, folder)
    edit_config(folder, **said)
    oracle = load_adapter(model, folder)
    for name in beside:
        (folder / name).parent.mkdir(exist_ok=True)
        # Only these files are read. The others are invalid pickles or invalid JSON.
        (folder / name).write_bytes(READ.get(name, b"\x80\x04x"))
    base = base_of(model, name="org/Tiny-Llama-1B")
    loader = AdapterLoader(tmp_path, base, 1 << 30, 64)
    loaded = loader.lower(loader.read_new(Source(path)))
    reasons = [getattr(warning, "reason", None) for warning in loaded.facts.warnings]
    # Unsloth's dynamic checkpoints keep other modules in 16 bits than this base does.
    assert reasons == ["OTHER_QUANTIZATION"] * (tool == "unsloth")
    origins = {"chat_template.jinja", "tokenizer_config.json"} & {*beside}
    assert origin_of(loaded.facts.chat_template) == min(origins, default="")
    assert loaded.facts.base_model == said["base_model_name_or_path"]
    found = logits(with_operators(model, [(loaded.operators, 1.0)]))
    torch.testing.assert_close(found, logits(oracle), rtol=1e-4, atol=1e-5)


def test_the_last_checkpoint_of_a_run_folder_is_suggested(tmp_path: Path) -> None:
    # The last name is a digit, but not a decimal one.
    folders = [*(f"out/checkpoint-{number}" for number in (9, 30, 500)), "other/\u00b2"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "out" / "checkpoint-9")
    loader = AdapterLoader(tmp_path, base_of(tiny_llama()), 1 << 30, 64)
    for path, closest in (("out", folders[2]), ("other", folders[3])):
        with pytest.raises(AdapterCheckpointError) as caught:
            loader.read(Source(path))
        assert says("NOT_AN_ADAPTER", closest=closest)(caught.value)
