"""PEFT's methods that are not served, and what to do with an adapter of each."""

from __future__ import annotations

from collections.abc import Mapping

_CONVERT = "convert it with PEFT's save_as_lora and load the LoRA that makes"
_MERGE = (
    "merge it into its base with PEFT's merge_and_unload and serve the result as the base model, or"
    " train one of the served methods"
)
_PROMPT = "train PROMPT_TUNING instead"


def _all(kinds: str, advice: str) -> dict[str, str]:
    return dict.fromkeys(kinds.split(), advice)


# ``peft_type`` → advice. The first group has a conversion in PEFT that is exact or close, as its
# reply says; the second can only be merged.
UNSERVED: Mapping[str, str] = {
    **_all(
        "C3A DELORA FOURIERFT GRALORA HIRA MISS PSOFT RANDLORA SHIRA TINYLORA UNILORA VBLORA"
        " WAVEFT",
        _CONVERT,
    ),
    **_all(
        "ADAMSS BEFT BOFT DEFT FROD GLORA HRA LILY LN_TUNING OFT OSF PEANUT PVERA ROAD SHADOW"
        " SUPERTUNING",
        _MERGE,
    ),
    "ADAPTION_PROMPT": "its gate has no operator here; train PREFIX_TUNING instead",
    "CARTRIDGE": "train PREFIX_TUNING instead, which also stores keys and values",
    "CPT": f"its embeddings carry label masks; {_PROMPT}",
    "MULTITASK_PROMPT_TUNING": f"a request would have to name a task; {_PROMPT}, one per task",
    "POLY": "it routes between LoRAs by task; train one LORA per task",
    "XLORA": "its gate needs a pass of its own; load its LoRAs and request a weighted mix of them",
}
