"""The example fusion refers to the current example adapters."""

from __future__ import annotations

from builders.adapters import read_adapter
from checkout import ROOT

from turret.server.adapters.component import component_refs

EXAMPLES = ROOT / "examples"


def test_the_fusions_components_are_the_example_adapters() -> None:
    (fusion,) = (EXAMPLES / "fusions").iterdir()
    refs = component_refs(read_adapter(EXAMPLES, f"fusions/{fusion.name}").config)
    assert len(refs) == 2
    for ref in refs:
        # After training a component again, also train the fusion: examples/train/json-sql.toml.
        assert read_adapter(EXAMPLES, f"adapters/{ref.name}").digest == ref.digest
    assert (fusion / "adapter_model.safetensors").stat().st_size <= 1_000_000
