"""Files of an aLoRA: rejections, stored properties, and unsupported combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    lower_adapter,
    read_adapter,
    refusal_of,
    tiny_llama,
)
from builders.methods import make_config, save_adapter
from builders.mixes.fuse import Fusions, model
from said import says

from turret.server.adapters.adapter import Source
from turret.server.adapters.component import Component, ComponentRef
from turret.server.adapters.lowering.components import check_fusable
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterMismatchError,
    InvalidRequestError,
)


def save(folder: Path, **changes: Any) -> Path:
    save_adapter(tiny_llama(), make_config("alora", **changes), folder / "a")
    return folder / "a"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1, -1]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1.0]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"velora_config": {"scale": 1.0}}, "alora_invocation_tokens"),
        ({"use_dora": True}, "alora_invocation_tokens"),
        ({"target_parameters": ["q_proj.weight"]}, "alora_invocation_tokens"),
    ],
)
def test_parts_that_act_before_the_invocation_are_rejected(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    directory = save(tmp_path, target_modules=["q_proj"])
    edit_config(directory, **changes)
    assert field in {name for name, _ in refusal_of(tmp_path).violations}


def test_the_embedding_and_unknown_tokens_are_refused(tmp_path: Path) -> None:
    # PEFT does not create an aLoRA on the embedding.
    config = make_config("lora", target_modules=["q_proj", "embed_tokens"])
    save_adapter(tiny_llama(), config, tmp_path / "a")
    edit_config(tmp_path / "a", alora_invocation_tokens=[7])
    (why,) = refusal_of(tmp_path).violations
    assert why[0] == "target_modules"
    directory = save(tmp_path, target_modules=["q_proj"])
    size = base_of(tiny_llama()).vocabulary.size
    edit_config(directory, alora_invocation_tokens=[1, size])
    with pytest.raises(AdapterMismatchError) as caught:
        raise refusal_of(tmp_path)
    assert [field for field, _ in caught.value.violations] == ["alora_invocation_tokens"]
    edit_tensors(directory, lambda tensors: {n: t for n, t in tensors.items() if "lora_A" in n})
    fields = [field for field, _ in refusal_of(tmp_path).violations]
    assert {field.rpartition(".lora_")[2] for field in fields} == {"B.weight"}


def test_an_alora_can_be_neither_fused_nor_a_component(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path)
    fusions.add("lora")
    fusions.add("activated", "alora")
    for how in ("exact", "svd"):
        with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter="activated")):
            fusions.fuse({"activated": 1.0, "lora": 1.0}, how=how)
    fusions.root.joinpath("activated").rename(fusions.root / "a")
    operators = lower_adapter(fusions.root, base_of(model())).operators
    component = Component(ComponentRef("activated", "0" * 64), "alora", operators, (4,))
    with pytest.raises(AdapterCheckpointError, check=says("UNFIT_COMPONENT", method="alora")):
        check_fusable([component], "fusion")
    fusions.close()


def test_the_window_of_an_alora_survives_a_restart(tmp_path: Path) -> None:
    facts = lower_adapter(save(tmp_path).parent, base_of(tiny_llama())).facts(
        read_adapter(tmp_path), "alora"
    )
    assert facts.invocation == (7,)
    saved = SavedRegistration(
        name="a", uuid="u", generation=1, pinned=False, source=Source("a"), facts=facts
    )
    assert SavedRegistration.from_json(saved.to_json()) == saved
