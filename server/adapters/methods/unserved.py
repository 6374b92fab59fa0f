"""Values of ``peft_type`` that are not served, with advice for such adapters. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

CONVERT = (
    "convert it to an exact LoRA with `turret convert DIR --base MODEL --output NEW`, where MODEL"
    " is the model it was trained on"
)
# ``peft_type`` → advice; tests compare the keys with the installed PEFT.
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"its file lacks the clusters of rows that it adapts; {CONVERT}",
    "PSOFT": f"its file lacks the factors that it rotates; {CONVERT}",
    "LILY": (
        "its routers average over all tokens of a call, so that no token has a result of its own;"
        " train one of the served methods"
    ),
    "SHADOW": "it is a second model in addition to the base; train one of the served methods",
}
