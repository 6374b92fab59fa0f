"""PEFT's methods that are not served, and what to do with an adapter of each."""

from __future__ import annotations

from collections.abc import Mapping

CONVERT = (
    "convert it with PEFT's save_as_lora, with its own rank and on the base model it was trained"
    " on, and load the LoRA that makes"
)
MERGE = (
    "merge it with PEFT's merge_and_unload into the base model it was trained on and serve the"
    " result as the base model, or train one of the served methods"
)
# ``peft_type`` → advice; tests follow it with the PEFT installed.
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"the clusters of rows it adapts are not in its file; {MERGE}",
    "PSOFT": f"the factors it turns are not in its file; {CONVERT}",
    "LILY": (
        "its routers average over all tokens of a call, so that no token has a result of its own;"
        " train one of the served methods"
    ),
    "SHADOW": "it is a second model beside the base; train one of the served methods",
    "XLORA": (
        "its scalings need a pass of the base before every pass of its own, and files written by"
        " version 0.20 and later lack the first layer of its classifier; load its LoRAs and request"
        " a weighted mix of them, or route between them by an arrow_config"
    ),
}
