"""Values of ``peft_type`` that are not served, with advice for such adapters. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

CONVERT = (
    "`turret convert DIR --base MODEL --output NEW`, with the model it was trained on, makes an"
    " exact LoRA of it, which is served"
)
# ``peft_type`` → advice; tests compare the keys with the installed PEFT.
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"the clusters of rows it adapts are not in its file; {CONVERT}",
    "PSOFT": f"the factors it turns are not in its file; {CONVERT}",
    "LILY": (
        "its routers average over all tokens of a call, so that no token has a result of its own;"
        " train one of the served methods"
    ),
    "SHADOW": "it is a second model beside the base; train one of the served methods",
}
