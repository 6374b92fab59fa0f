"""The model's tokenizer and chat template (transformers), as the server uses them."""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream
from tokenizers.models import WordLevel

from turret.server.adapters.adapter import OwnTemplate
from turret.server.basics import codes
from turret.server.basics.turns import FairPool
from turret.server.basics.work import LACK_OF_MEMORY_IS_REPORTED, PANICS_ARE_ERRORS
from turret.server.errors import InvalidRequestError, TurretError
from turret.server.models.chat_template import (
    USUAL,
    ChatFormat,
    ChatTemplate,
    Rendering,
    unknown_role,
)
from turret.server.models.encoder import Encoder
from turret.server.words import say


class TokenStream:
    """Decodes one sequence token by token.

    Text is returned only when it is complete: a character that spans several byte tokens is
    returned with the last of them. Spaces at the beginning of words are correct.

    Args:
        backend: The tokenizer.
        shown: Special tokens that count as text, by their ids; the others are dropped.
    """

    def __init__(self, backend: Any, shown: Mapping[int, str]) -> None:
        self._backend = backend
        self._shown = shown
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain (often one word, sometimes none)."""
        with PANICS_ARE_ERRORS:
            text = self._stream.step(self._backend, token_id) or ""
        return text + self._shown[token_id] if token_id in self._shown else text


class UserTextStream(TokenStream):
    """Decodes an answer in channels (gpt-oss's format); keeps only the messages to the user.

    ``basics/codes.py`` describes the format.

    If an answer does not begin with a mark, all of it is text. This is the case under a constraint.

    Args:
        backend: The tokenizer.
        marks: Special tokens of channels, by their ids.
    """

    def __init__(self, backend: Any, marks: Mapping[int, str]) -> None:
        super().__init__(backend, {})
        self._marks = marks
        # Text of the current message's header so far; None outside a header.
        self._header: str | None = None
        self._is_for_user = True

    def push(self, token_id: int) -> str:
        text, mark = super().push(token_id), self._marks.get(token_id)
        if mark == codes.MESSAGE:
            self._is_for_user = codes.Header.parse(self._header or "").is_for_user
            self._header = None
        elif mark in codes.ENDS:
            self._header = ""
        elif mark is not None:
            self._header = (self._header or "") + mark
        elif self._header is not None:
            self._header += text
        elif self._is_for_user:
            return text
        return ""


_BEFORE = "\n"
_MAX_AROUND = 8


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The result of rendering a conversation with a chat template.

    Attributes:
        parts: Alternately, text in which special tokens count, and the text of a special token that
            was part of the conversation and does not count.
    """

    parts: Sequence[str]

    @property
    def opens_reasoning(self) -> bool:
        """Whether the answer begins within a block of reasoning."""
        return self.parts[-1].rstrip().endswith("<think>")

    @property
    def num_chars(self) -> int:
        """Length of the whole text."""
        return sum(map(len, self.parts))


class Tokenizer:
    """Converts text to token ids and back. Thread-safe.

    If contradictory rules make the library panic, a RuntimeError is raised.

    Attributes:
        vocab_size: Exclusive upper bound of the ids that both the tokenizer and the model have,
            because a tokenizer may have tokens without a row in the model. Not every id below it
            is a token.
        num_rows: Rows of the model's embedding.
        longest_token: Number of characters of the longest token. A text of n characters has at
            least n / ``longest_token`` tokens.
        chat_format: The features of the chat template beyond turns.
        template_variables: The special tokens that chat templates can name, such as ``eos_token``.
    """

    def __init__(
        self,
        inner: Any,
        eos_token_ids: frozenset[int],
        model_vocab_size: int,
        base: Tokenizer | None = None,
    ) -> None:
        if base is None:
            backend = inner.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            vocabulary: dict[str, int] = backend.get_vocab()
            longest, last = 1, -1
        else:
            backend = _with_added(base._backend, inner.backend_tokenizer)
            vocabulary = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
            longest, last = base.longest_token, base._last
        self._backend = backend
        self._encoder = Encoder(backend)
        self.longest_token = max((longest, *map(len, vocabulary)))
        # Use the largest id instead of the count, because ids may have a gap between words and
        # special tokens.
        self._last = max((last, *vocabulary.values()))
        self.vocab_size: int = min(self._last + 1, model_vocab_size)
        self.num_rows = model_vocab_size
        own = None if inner.eos_token is None else backend.token_to_id(inner.eos_token)
        ends = eos_token_ids | (frozenset() if own is None else {own})
        self.eos_token_ids = frozenset(token for token in ends if token < model_vocab_size)
        # The token that the tokenizer puts before every text, or None.
        bos = None if inner.bos_token is None else backend.token_to_id(inner.bos_token)
        self._bos: int | None = bos if bos in self._ids("", add_special_tokens=True)[:1] else None
        template = inner.chat_template
        if not isinstance(template, str | dict) or not template:
            template = {} if base is None else base._templates
        templates = {"default": template} if isinstance(template, str) else template
        self._set_templates(templates, inner.special_tokens_map)
        # All templates from conversations share these processes, because clients may send thousands
        # of templates.
        self._in_chats = ChatTemplate({}, {}) if base is None else base._in_chats
        # Texts of single tokens, by id, because log probabilities need thousands of them in each
        # step.
        self._texts: dict[int, str] = {}
        # The texts of special tokens, with the token ids that they have as ordinary text.
        self._as_text = _special_as_text(backend)
        # Finds special tokens in texts, in linear time even if there are many.
        self._finder: Any = tokenizers.Tokenizer(WordLevel({"": 0}, unk_token=""))
        self._finder.add_special_tokens(
            [tokenizers.AddedToken(text, normalized=False) for text in self._as_text]
        )

    @classmethod
    @PANICS_ARE_ERRORS
    def load(
        cls,
        files: Path,
        eos_token_ids: frozenset[int],
        model_vocab_size: int,
        base: Tokenizer | None = None,
    ) -> Tokenizer:
        """Load from a model directory.

        Args:
            files: The directory.
            eos_token_ids: End-of-sequence tokens in the model's config.
            model_vocab_size: Rows of the model's embedding.
            base: The tokenizer to which the directory's added tokens are added; the result shares
                its memory. Only the special tokens are read from the directory's vocabulary and
                rules.

        Raises:
            InvalidRequestError: The directory has no tokenizer that converts to a fast one.
            OutOfMemoryError: There is no memory to read it.
        """
        from transformers import AutoTokenizer

        try:
            with LACK_OF_MEMORY_IS_REPORTED:
                inner = AutoTokenizer.from_pretrained(files)
            if not inner.chat_template:
                inner.chat_template = _processor_template(files)
            if not inner.is_fast:
                raise ValueError(say("TOKENIZER_SLOW"))
        except TurretError:
            raise
        except Exception as error:
            # The libraries raise errors of any type. Join the lines of the message.
            said = say("TOKENIZER_UNREADABLE", path=files, problem=" ".join(str(error).split()))
            raise InvalidRequestError.of("model", said) from error
        return cls(inner, eos_token_ids, model_vocab_size, base)

    def with_template(self, own: OwnTemplate) -> Tokenizer:
        """This tokenizer with an adapter's chat template, or the same object if nothing differs.

        Answers also end at the adapter's end token.
        """
        tokens = {**self.template_variables, **own.tokens}
        variables = {name: token for name, token in tokens.items() if token is not None}
        end = own.tokens.get("eos_token")
        number = None if end is None else self.number_of(end)
        ends = self.eos_token_ids
        if number is not None and number < self.num_rows:
            ends |= {number}
        templates = own.templates
        if templates.get("default") == self._templates.get("default"):
            # transformers may have saved the adapter's other templates in files that turret does
            # not read, so use the base's.
            templates = {**self._templates, **templates}
        content = templates, variables, ends
        if content == (self._templates, self.template_variables, self.eos_token_ids):
            return self
        made = copy.copy(self)
        made.eos_token_ids = ends
        made._set_templates(templates, variables, self._in_chats if own.is_in_chat else None)
        return made

    def _set_templates(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, str],
        like: ChatTemplate | None = None,
    ) -> None:
        """Set the chat templates, by name, and the special tokens that they write.

        The templates are rendered by the processes of ``like``, or by their own.
        """
        added = self._backend.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        self._templates, self.template_variables = templates, variables
        self.chat_format = ChatFormat.of(templates, special)
        self._chats = ChatTemplate(templates, variables, like)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates)

    @property
    def default_template(self) -> str | None:
        """The chat template for conversations without tools; None without one."""
        return self._templates.get("default")

    def check_template(self) -> None:
        """Compile the chat template. Blocks.

        Raises:
            InvalidRequestError: The template is invalid.
            UnavailableError: See ``ChatTemplate.render``.
        """
        try:
            self._chats.check()
        except ValueError as error:
            raise InvalidRequestError(say("CHAT_TEMPLATE_INVALID", problem=error)) from error

    def number_of(self, token: str) -> int | None:
        """The id of a token by its text; None if there is no such token."""
        return self._backend.token_to_id(token)

    def beyond(self, rows: int) -> dict[str, int]:
        """Tokens whose ids are not below ``rows``."""
        found = ((self._backend.id_to_token(i), i) for i in range(rows, self._last + 1))
        return {token: number for token, number in found if token is not None}

    @PANICS_ARE_ERRORS
    def serialized(self) -> str:
        """The tokenizer as ``tokenizer.json`` holds it."""
        return self._backend.to_str()

    @PANICS_ARE_ERRORS
    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        """Tokenise a raw prompt. The tokenizer's own BOS rule applies.

        If the text already begins with a BOS, as a rendered chat does, no other is added.

        Args:
            text: The prompt.
            adds_special: Whether the tokenizer adds its special tokens.
        """
        ids = self._ids(text, add_special_tokens=adds_special)
        if not adds_special:
            return ids
        is_twice = self._bos is not None and ids[:2] == [self._bos] * 2
        return ids[1:] if is_twice else ids

    @property
    def encodes_at_once(self) -> bool:
        """Whether encoding a short text is fast enough for the event loop."""
        return not self._encoder.is_confined

    def chat_pool(self, is_short: bool) -> FairPool:
        """The pool in which to call ``render_chat`` for a short or a long conversation."""
        return self._chats.pool(is_short)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        special: bool = False,
        is_short: bool = True,
        how: Rendering = USUAL,
    ) -> RenderedChat:
        """Apply the chat template. Blocks.

        Only the template can write special tokens. In roles, contents and tools, the texts of
        special tokens are ordinary text unless ``special``, as with ``split_special_tokens`` in
        transformers. So text inside a turn cannot end the turn and begin another.

        Raises:
            InvalidRequestError: There is no chat template, the template does not support tools, a
                role is unknown, or the template rejects the messages or exceeds a limit.
            UnavailableError: See ``ChatTemplate.render``.
        """
        if not self._templates:
            raise InvalidRequestError.of("chat", say("NO_CHAT_TEMPLATE"))
        for index, message in enumerate(messages):
            if why := unknown_role(self._templates, message["role"]):
                raise InvalidRequestError.of(f"chat.messages[{index}].role", why)
        if self.chat_format.tools is None:
            if tools:
                raise InvalidRequestError.of("chat.tools", say("TOOLS_UNSUPPORTED"))
            if any("tool_calls" in m or m["role"] == "tool" for m in messages):
                raise InvalidRequestError.of("chat.messages", say("TOOLS_UNSUPPORTED"))
        held: list[str] = []
        # Use letters and digits only, because templates do not change such text.
        mark = f"turret{uuid.uuid4().hex}x"

        try:
            if not special:
                given, texts = [list(messages), list(tools), dict(how.variables)], list[str]()
                each_text(given, lambda text: texts.append(text) or text)
                marked = iter(self._marked(texts, mark, held))
                messages, tools, variables = each_text(given, lambda text: next(marked))
                how = replace(how, variables=variables)
            if how.continues:
                *before, last = messages
                # The space shows whether the template keeps spaces at the end of a message.
                end, final = f"{mark}end ", last["content"]
                messages = [*before, {**last, "content": final + end}]
                text = _cut(self._chats.render(messages, tools, is_short, how), final, end)
            else:
                text = self._chats.render(messages, tools, is_short, how)
            parts = re.split(f"{mark}(\\d+)x", text)
            # A template may write marks of its own; a number without a text raises IndexError.
            parts[1::2] = [held[int(number)] for number in parts[1::2]]
        except (ValueError, IndexError, RecursionError) as error:
            said = say("CHAT_TEMPLATE_FAILED", problem=error)
            raise InvalidRequestError.of("chat.messages", said) from error
        return RenderedChat(parts)

    @PANICS_ARE_ERRORS
    def encode_rendered(self, chat: RenderedChat) -> list[int]:
        """The tokens of a rendered conversation."""
        first, *others = chat.parts
        ids = self._ids(first, add_special_tokens=False)
        if others:
            pieces = _ids_within(self._encoder.encode, others[1::2])
            for written, piece in zip(others[::2], pieces, strict=True):
                ids += self._as_text[written]
                ids += piece
        return ids

    @PANICS_ARE_ERRORS
    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a whole sequence, with special tokens if ``special``."""
        return self._backend.decode(list(token_ids), skip_special_tokens=not special)

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special tokens shown."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], special=True)
        return text

    def stream(self, call_marks: bool = False, user_text_only: bool = False) -> TokenStream:
        """An incremental decoder for one sequence.

        Args:
            call_marks: Whether special tokens around tool calls and channels count as text.
            user_text_only: Whether only the text for the user of an answer in channels is returned.
        """
        marks = self.chat_format.marks
        texts = {token: text for text, token in marks.items()}
        if user_text_only and not call_marks and {codes.CHANNEL, codes.MESSAGE} <= marks.keys():
            return UserTextStream(self._backend, texts)
        return TokenStream(self._backend, texts if call_marks else {})

    def close(self) -> None:
        """End the processes that render conversations."""
        self._chats.close()
        self._in_chats.close()

    def _marked(self, texts: Sequence[str], mark: str, held: list[str]) -> list[str]:
        """Texts with a mark in place of each special token, whose text is added to ``held``."""
        marked = []
        for text, found in zip(texts, self._finder.encode_batch(texts), strict=True):
            pieces, end = [], 0
            for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
                if token:
                    pieces += text[end:start], f"{mark}{len(held)}x"
                    held.append(text[start:stop])
                    end = stop
            marked.append("".join(pieces) + text[end:])
        return marked

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        (ids,) = self._encoder.encode([text], add_special_tokens=add_special_tokens)
        return ids


def _cut(text: str, final: str, end: str) -> str:
    """A text up to ``end``, which was appended to the final message; transformers cuts it likewise.

    Raises:
        ValueError: The template has changed the message.
    """
    place = text.rfind(end.strip())
    if place < 0 or final.strip() not in text:
        raise ValueError(say("CANNOT_CONTINUE"))
    return text[:place] if text.startswith(end, place) else text[:place].rstrip()


def _with_added(base: Any, other: Any) -> Any:
    """A backend with the vocabulary and rules of one and the added tokens of another."""
    grown: Any = tokenizers.Tokenizer(base.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(base, part)) is not None:
            setattr(grown, part, value)
    added = other.get_added_tokens_decoder()
    # transformers may add its own special tokens. Without the vocabulary, it gives them the ids of
    # words, so add them after the tokens of the file.
    words = base.get_vocab_size(with_added_tokens=False)
    order = sorted(added, key=lambda number: (number < words, number))
    grown.add_tokens([added[number] for number in order])
    (alone,) = grown.encode_batch(["a"])
    if other.post_processor is not None:
        grown.post_processor = other.post_processor
    (whole,) = grown.encode_batch(["a"])
    around = grown.num_special_tokens_to_add(False)
    if around > _MAX_AROUND or len(whole.ids) != len(alone.ids) + around:
        raise ValueError(say("POST_PROCESSOR_UNSUPPORTED", most=_MAX_AROUND))
    return grown


def _processor_template(files: Path) -> str | None:
    """The chat template that a multimodal model stores for its processor."""
    try:
        template = json.loads((files / "chat_template.json").read_text())["chat_template"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return template if isinstance(template, str) else None


def each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """A JSON value with every text in it converted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [each_text(one, change) for one in value]
    if isinstance(value, dict):
        return {change(key): each_text(one, change) for key, one in value.items()}
    return value


def _special_as_text(backend: Any) -> dict[str, list[int]]:
    """The text of every special token, with the ids that it has as ordinary text."""
    tokens = backend.get_added_tokens_decoder().values()
    texts = [token.content for token in tokens if token.special]
    # The switch belongs to the tokenizer, so use it before anything else uses the tokenizer.
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True

    def encode(batch: Sequence[str]) -> list[list[int]]:
        return [list(one.ids) for one in backend.encode_batch(batch, add_special_tokens=False)]

    try:
        return dict(zip(texts, _ids_within(encode, texts), strict=True))
    finally:
        backend.encode_special_tokens = before


def _ids_within(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """The ids that texts have when they follow other text.

    Some tokenizers put a space before every text. So a line end is put first here, and the tokens
    of both are removed again.
    """

    def begun_by(before: str) -> list[list[int]]:
        return encode([before + text for text in ("", *texts)])

    before, *after = begun_by(_BEFORE)
    _, *alone = begun_by("")
    size = len(before)
    # A text that itself begins with a line end may merge with the preceding one. Use its own ids
    # then.
    pairs = zip(after, alone, strict=True)
    return [ids[size:] if ids[:size] == before else own for ids, own in pairs]
