"""What reading an adapter told about it: kept in memory and on disk, without its weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """Fixed for one generation.

    Attributes:
        digest: SHA-256 over config and weights, hex.
        method: ``lora``, ``dora``, …
        ranks: Distinct ranks, ascending.
        target_modules: Distinct last components of the adapted paths, ascending.
        base_model: The base that the config names, or "".
        warnings: Warnings for the operator.
        num_soft_tokens: Soft tokens it puts before the prompt.
        num_prefix_positions: Positions before the prompt whose keys and values it brings.
        bytes_disk: Size of the checkpoint's files.
        bytes_host: What its operators take in host memory, in the dtype served when it was read.
        invocation: Tokens from whose last occurrence in the prompt on it acts; empty if everywhere.
        labels: Labels of its classification head; empty without one.
        problem_type: See ``Head``; empty without one.
        first_pass: What runs before every pass of its own and tells it its scalings: ``base``, or
            ``adapter`` (itself, at constant scalings); empty where nothing does.
        components: Digests of the adapters it is built from; they must stay registered.
        vocab_size: Rows of its vocabulary, where those are not as many as the base's or it has a
            tokenizer of its own; else 0.
        tokenizer: SHA-256 over the files of its own tokenizer, hex; empty where its requests have
            the base's.
        chat_template: The chat template that it brings, as ``OwnTemplate`` writes it; empty
            without one.
    """

    digest: str
    method: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    base_model: str
    warnings: tuple[str, ...]
    num_soft_tokens: int
    num_prefix_positions: int
    bytes_disk: int
    bytes_host: int
    components: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    problem_type: str = ""
    vocab_size: int = 0
    tokenizer: str = ""
    first_pass: str = ""
    chat_template: str = ""

    @property
    def content(self) -> tuple[str, str]:
        """Equal only for the same content: the digest of its weights, and its chat template."""
        return self.digest, self.chat_template
