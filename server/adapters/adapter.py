"""A registered adapter: its generation, its files, and the facts about it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.basics.names import HUB_SCHEME, HubId
from turret.server.errors import AdapterInUseError, InvalidRequestError, TurretError
from turret.server.words import say

# Limit of the absolute value of a weight in a mix.
MAX_WEIGHT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One member of a mix, by name.

    Attributes:
        name: The name of an adapter, or of an alias if there is a draw.
        generation: The number of a generation; None for the current one.
        weight: The factor of the adapter's update.
        draw: A random number in [0, 1) that chooses among the targets of an alias. None if the name
            must be an adapter's.
    """

    name: str
    generation: int | None = None
    weight: float = 1.0
    draw: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        ok = math.isfinite(self.weight) and abs(self.weight) <= MAX_WEIGHT
        if not ok:
            why = say("NOT_IN_RANGE", value=self.weight, least=-MAX_WEIGHT, most=MAX_WEIGHT)
            raise InvalidRequestError.of("adapters.weight", why)


MAX_ALIASES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasTarget:
    """A generation of an adapter, with its weight relative to the alias's other targets."""

    name: str
    uuid: str
    generation: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for one of its targets in each request. It has at least one target."""

    name: str
    targets: tuple[AliasTarget, ...]

    def pick(self, draw: float) -> AliasTarget:
        """The target for a random number in [0, 1)."""
        left = draw * sum(target.weight for target in self.targets)
        for target in self.targets:
            left -= target.weight
            if left < 0:
                return target
        return self.targets[-1]

    def generations_of(self, name: str) -> set[int]:
        """The generations of an adapter that the alias names."""
        return {target.generation for target in self.targets if target.name == name}


def check_alias(alias: Alias, others: Collection[str], *, is_adapter: bool) -> None:
    """Checks an alias before it is set. The caller checks that its targets exist.

    Args:
        alias: The alias.
        others: The names of all aliases.
        is_adapter: Whether an adapter has the same name.

    Raises:
        InvalidRequestError: An adapter has the name, there are too many aliases, or a target occurs
            twice.
    """
    if is_adapter:
        raise InvalidRequestError.of("name", say("NAME_OF_ADAPTER", value=alias.name))
    if len(others) >= MAX_ALIASES and alias.name not in others:
        raise InvalidRequestError.of("name", say("TOO_MANY_ALIASES", most=MAX_ALIASES))
    keys = [f"{target.name}@{target.generation}" for target in alias.targets]
    for key, count in Counter(keys).items():
        if count > 1:
            raise InvalidRequestError.of("targets", say("DUPLICATE", value=key))


def check_no_target(name: str, aliases: Iterable[Alias]) -> None:
    """Raises AdapterInUseError if an alias names the adapter."""
    found = sorted(alias.name for alias in aliases if alias.generations_of(name))
    if found:
        text = say("ADAPTER_IS_TARGET", adapter=name, aliases=", ".join(found))
        raise AdapterInUseError(text)


class _Numbered(Protocol):
    @property
    def generation(self) -> int: ...


_N = TypeVar("_N", bound=_Numbered)


def kept_generations(
    name: str, current: _Numbered, replaced: Sequence[_N], keep: int, aliases: Iterable[Alias]
) -> tuple[_N, ...]:
    """The replaced generations of an adapter that requests may still name.

    These are the last ``keep`` ones, those that an alias names, and the one with the highest
    number, because the next new weights get the number after it.

    Args:
        name: The adapter's name.
        current: The generation that the name stands for.
        replaced: The replaced generations, in the order in which they were replaced.
        keep: How many of the most recently replaced ones are kept in any case.
        aliases: All aliases.
    """
    surplus = max(len(replaced) - keep, 0)
    needed = {generation for alias in aliases for generation in alias.generations_of(name)}
    needed.add(max(each.generation for each in (current, *replaced)))
    return tuple(
        each for index, each in enumerate(replaced) if index >= surplus or each.generation in needed
    )


# The two files of an adapter, as PEFT names them.
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
# Further files of an adapter with its own tokens, and their maximum sizes. No other tokenizer files
# are read. The tokenizer.json of Gemma 3 takes 33 MB.
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = {
    TOKENIZER_FILE: 64 << 20,
    TOKENIZER_CONFIG_FILE: 4 << 20,
    SPECIAL_TOKENS_FILE: 1 << 20,
    "added_tokens.json": 4 << 20,
    TEMPLATE_FILE: 256 << 10,
}
# A chat template and its special tokens are read from these files, even if all tokens are the
# base's.
TEMPLATE_FILES = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE)
# ``turret train`` writes this file alongside its adapters; reading it is optional.
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A directory with ``CONFIG_FILE`` and ``TENSORS_FILE``.

    Attributes:
        path: Relative to the adapter root, or to the state directory if ``is_upload``; or
            ``hub:org/name@commit``.
        is_upload: Whether the server wrote the files itself, and so removes them when they are not
            needed.
        adapter: The adapter's name, for an upload.
        task: The task, if the files contain several; None if not specified.
        origin: Where an upload was fetched from, such as ``oci://host/name@sha256:…``; empty if a
            client sent it.
    """

    path: str
    is_upload: bool = False
    adapter: str = field(default="", compare=False)
    task: int | None = None
    origin: str = ""

    @property
    def is_hub(self) -> bool:
        """Whether the files are those of a commit on the hub."""
        return not self.is_upload and self.path.startswith(HUB_SCHEME)

    @property
    def place(self) -> str:
        """The directory, relative to the one in which the source's files are opened."""
        if not self.is_hub:
            return self.path
        return HubId.parse(self.path.removeprefix(HUB_SCHEME)).snapshot

    @property
    def shown(self) -> str:
        """The path for messages, which must not show where the server keeps uploads."""
        return self.adapter or self.path

    @property
    def came_from(self) -> str:
        """Where the files came from, for clients; empty if a client uploaded them."""
        return self.origin if self.is_upload else self.path


SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
# Values of ``problem_type`` as transformers writes them.
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
MAX_LABELS, MAX_LABEL_CHARS = 4096, 256


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head without its weights.

    Attributes:
        labels: One label for each number that the head computes, in order.
        problem_type: One of ``PROBLEM_TYPES``: exactly one label applies, any number of labels
            apply, or the numbers themselves are the answer.
    """

    labels: tuple[str, ...]
    problem_type: str


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of an adapter's own tokenizer, ready for transformers but not interpreted yet.

    Attributes:
        files: Content by name; ``tokenizer.json`` is among the files.
        digest: SHA-256 over all files as they were read, hex.
        bytes_disk: Size of all files as they were read.
    """

    files: Mapping[str, bytes]
    digest: str
    bytes_disk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """The facts about one generation that reading its files found; they never change.

    The server keeps them in memory and on disk, without the weights.

    Attributes:
        digest: SHA-256 over config, weights and, if there are any, the task and its own tokenizer;
            hex.
        method: ``lora``, ``dora``, …
        ranks: Distinct ranks, ascending.
        target_modules: Distinct last components of the adapted paths, ascending.
        base_model: The base that the config names, or "".
        warnings: Warnings for the server's operator.
        num_soft_tokens: The number of its soft tokens before the prompt.
        num_prefix_positions: The number of positions before the prompt for which it has keys and
            values.
        bytes_disk: Size of the checkpoint's files.
        bytes_host: Size of its operators in host memory, in the dtype served when it was read.
        invocation: The tokens at whose last occurrence in the prompt the adapter takes effect;
            empty if it applies everywhere.
        labels: Labels of its classification head; empty without one.
        problem_type: See ``Head``; empty without one.
        first_pass: The pass that computes the weights of its components before each regular pass:
            ``base`` (without the adapter), or ``adapter`` (with it, at constant weights); empty for
            none.
        components: Digests of the adapters that it is built from, which must stay registered.
        vocab_size: Number of rows of its vocabulary, if it differs from the base's or the adapter
            has its own tokenizer; otherwise 0.
        tokenizer: SHA-256 over the files of its own tokenizer, hex; empty if its requests use the
            base's.
        chat_template: Its own chat template, as ``OwnTemplate.to_json`` writes it; empty without
            one.
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
        """The digest and the chat template, which are both equal only for the same content."""
        return self.digest, self.chat_template


# Origins of a template that is not in the adapter's files: the caller sent it, or a fusion took it
# from its members.
REQUEST, MEMBERS = "request", "members"
# Origin of a template in a chat request, which does not belong to an adapter.
IN_CHAT = "chat"


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A chat template other than the base's, with the special tokens that it writes.

    Attributes:
        origin: The file that contains it, ``REQUEST``, ``MEMBERS`` or ``IN_CHAT``.
        templates: The templates by name: ``default``, and perhaps ``tool_use`` for conversations
            with tools.
        tokens: Texts of special tokens by the template's variables, such as ``eos_token``; None for
            a token that the adapter's tokenizer lacks. For other variables, the base's are used.
    """

    origin: str
    templates: Mapping[str, str]
    tokens: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def is_in_chat(self) -> bool:
        """Whether the template comes from a chat request."""
        return self.origin == IN_CHAT

    def to_json(self) -> str:
        """The template in the form of ``AdapterFacts.chat_template``."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> OwnTemplate:
        """Reads what ``to_json`` wrote."""
        return cls(**json.loads(text))


def template_of(mix: Iterable[AdapterFacts]) -> str:
    """The chat template for a mix, from its first member that has one; empty for the base's."""
    return next((facts.chat_template for facts in mix if facts.chat_template), "")


@functools.lru_cache(maxsize=64)
def origin_of(chat_template: str) -> str:
    """The origin of ``AdapterFacts.chat_template``; empty if the adapter has no template."""
    return OwnTemplate.from_json(chat_template).origin if chat_template else ""


# Thousands of adapters are registered, so instances have no dictionary.
@dataclass(eq=False, repr=False, slots=True)
class Adapter:
    """One generation of a registered adapter.

    Its identity never changes. Everything else belongs to the registry and its leases and changes
    under their lock; reading single attributes without the lock is safe.

    Attributes:
        name: Registered name.
        uuid: Identifies the registration; all its generations have it.
        generation: The generation's number, from 1.
        key: Identifies this generation uniquely.
        facts: The facts that reading its files found.
        source: The location of its files.
        operators: The operators in host memory; None if they are only on disk. They do not change
            while a mix that was granted residency (see ``Mix.ensure_host``) holds the adapter,
            unless the base changes.
        base_generation: The generation of the base weights from which ``operators`` were computed;
            None if they do not depend on these weights.
        host_bytes_needed: Host memory that its operators take when resident.
        in_flight: Number of mixes that hold the adapter.
        holds: How many of these mixes were granted residency; an adapter with holds is not evicted.
        pinned: Whether it is never evicted.
        is_retired: Whether another generation has replaced it, or its name was removed.
        bytes_device: Bytes of its operators on the device, set by the code that copies them there.
    """

    name: str
    uuid: str
    generation: int
    source: Source
    facts: AdapterFacts
    operators: AdapterOperators | None = None
    base_generation: int | None = None
    in_flight: int = 0
    holds: int = 0
    pinned: bool = False
    is_retired: bool = False
    bytes_device: int = 0
    key: str = field(init=False)
    host_bytes_needed: int = field(init=False)

    def __post_init__(self) -> None:
        self.key = f"{self.uuid}.{self.generation}"
        self.host_bytes_needed = self.facts.bytes_host

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, generation={self.generation}, uuid={self.uuid!r})"

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def num_soft_tokens(self) -> int:
        return self.facts.num_soft_tokens

    @property
    def num_prefix_positions(self) -> int:
        return self.facts.num_prefix_positions

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.facts.invocation

    @property
    def first_pass(self) -> str:
        return self.facts.first_pass

    @property
    def head(self) -> Head | None:
        """The adapter's classification head, without the weights."""
        facts = self.facts
        return Head(facts.labels, facts.problem_type) if facts.labels else None

    @property
    def is_resident(self) -> bool:
        return self.operators is not None

    @property
    def residency(self) -> Residency:
        if self.bytes_device:
            return "device"
        return "host" if self.is_resident else "disk"


Residency = Literal["disk", "host", "device"]


State = Literal["LOADING", "ACTIVE", "DELETING"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A snapshot of an adapter, which later changes do not affect.

    Attributes:
        name: Registered name.
        uuid: Identifies this registration. A name that is loaded again after an unload gets a new
            one.
        generation: The generation's number, from 1. Each replacement under the same registration
            gets the next number.
        kept_generations: Replaced generations that requests may still name, ascending.
        facts: The facts that reading its files found.
        bytes_host: Bytes of operators held in host memory now.
        bytes_device: Bytes held on the device now.
        residency: The fastest tier that holds it now.
        pinned: Whether it is never evicted and cannot be unloaded.
        in_flight: Number of requests that hold it.
        last_used_time: Unix seconds of the last request, or None.
        state: While it is ``DELETING``, new requests are rejected.
        source: Where its files came from, such as a path with the hub's commit; "" if a client
            uploaded them.
    """

    name: str
    uuid: str
    generation: int
    facts: AdapterFacts
    bytes_host: int
    bytes_device: int
    residency: Residency
    pinned: bool
    in_flight: int
    last_used_time: float | None
    state: State
    source: str = ""
    kept_generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HostResult:
    """The answer to ``Mix.ensure_host``.

    Attributes:
        mix: The mix that was waiting.
        error: The reason why the mix cannot be served. If None, every member is resident, for as
            long as ``Mix.ensure_host`` says.
        load_seconds: The duration of each read, by the key of the member that was not resident.
    """

    mix: Mix
    error: TurretError | None = None
    load_seconds: Mapping[str, float] = field(default_factory=dict)


OnHost = Callable[[HostResult], None]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The result of ``AdapterRegistry.acquire``; compared by identity, released once.

    Attributes:
        members: ``(adapter, weight)`` in the request's order. A member of weight 0 adds nothing,
            but is reported, counted and resident like any other.
        tenant: The tenant of the request. Tenants whose mixes wait for memory take turns.
        key: ``(uuid, generation, weight)`` per member, on which a KV block's content depends.
    """

    members: tuple[tuple[Adapter, float], ...]
    _ensure_host: Callable[[Mix, OnHost], bool] | None = field(default=None, repr=False)
    tenant: bytes = b""
    key: tuple[tuple[str, int, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        key = tuple((a.uuid, a.generation, weight) for a, weight in self.members)
        object.__setattr__(self, "key", key)

    @property
    def head(self) -> Head | None:
        """The classification head of the first member that has one."""
        return next((a.head for a, _ in self.members if a.head is not None), None)

    @property
    def is_base(self) -> bool:
        return not self.members

    @property
    def is_resident(self) -> bool:
        """Whether the operators of every member are in host memory."""
        return all(adapter.is_resident for adapter, _ in self.members)

    def part(self, members: Iterable[tuple[Adapter, float]]) -> Mix:
        """A mix of only some of the members; holds no adapters and needs no release."""
        return Mix(tuple(members))

    def ensure_host(self, callback: OnHost) -> bool:
        """Asks for the operators of every member in host memory.

        Returns:
            True if they are in memory now and stay until release, or until the caller hands their
            memory over; the callback is then not called.
            False if they are being read or wait for room. The callback is then called once, and
            never after release. Any thread may call it, perhaps under the registry's lock, so it
            must only pass the result on.

        Raises:
            BudgetExceededError: The members can never be resident together.
        """
        return self._ensure_host is None or self._ensure_host(self, callback)


BASE_MIX = Mix(())
