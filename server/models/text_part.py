"""Which tensors of a checkpoint are the language model's, and what it alone calls them.

A checkpoint of a model of text and images holds a language model, a vision tower and what joins the
two. Only the language model is read; requests are text.
"""

from __future__ import annotations

# Prefixes of the language model within a multimodal model, as checkpoints write them (the names
# before transformers 4.52) and as current models do.
_TEXT = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# The other modules of these models.
_OTHERS = ("vision_tower.", "multi_modal_projector.", "visual.")
_SKIPPED = (*_OTHERS, *(f"model.{name}" for name in _OTHERS))


def text_name(name: str) -> str | None:
    """The tensor's name in the language model; None if it belongs to another part."""
    if name.startswith(_SKIPPED):
        return None
    for prefix, own in _TEXT:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
