"""Constraints for the tiny models, which have a token per byte."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from builders.bases.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

from turret.server.constraints.compiler import ConstraintCompiler
from turret.server.constraints.grammar import ConstraintKind, ConstraintSpec
from turret.server.constraints.matcher import Constraint, Matcher
from turret.server.models.tokenizer import Tokenizer


def make_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), frozenset({EOS}), VOCAB_SIZE)


def compiled(kind: ConstraintKind, *texts: str) -> Constraint:
    """A compiled constraint for the tiny models; raises the errors of the compilation."""
    return _compiler()._compile(ConstraintSpec(kind, texts))


@functools.cache
def _compiler() -> ConstraintCompiler:
    return ConstraintCompiler(make_tokenizer())


def tokens_of(matcher: Matcher) -> set[int]:
    """The allowed next tokens."""
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return set(bits.nonzero()[0].tolist())


def is_followed(constraint: Constraint, token_ids: Iterable[int]) -> bool:
    """Whether the constraint accepts these tokens as a whole answer."""
    matcher = constraint.matcher()
    for token in token_ids:
        if token not in tokens_of(matcher):
            return False
        matcher.advance(token)
    return EOS in tokens_of(matcher)
