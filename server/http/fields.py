"""Reads the object of a request into its model, and collects all errors in it."""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, to_json

from turret.closest import closest
from turret.server.api import limits
from turret.server.api.violations import MAX_VIOLATIONS, Violations
from turret.server.words import Text, say

UINT32 = (1 << 32) - 1
# More than the context of any model. The model's own limit is checked later.
MAX_TOKEN_IDS = 1 << 20
MAX_PROMPTS = 2048
# Limits on the comparison of unknown fields, which would otherwise take long. No client sends so
# many unknown fields, or such long names.
_MOST_UNKNOWN, _MOST_CHARS = 32, 40
# At most one letter in five may differ: "stops" means "stop", but "top_a" does not mean "top_k".
_LEAST_RATIO = 0.8
# Longer lists are rejected for their length, so their entries are not examined.
_MOST_OBJECTS = 4096

Violation = tuple[str, Text]
M = TypeVar("M", bound="Body")
_C = TypeVar("_C", bound="Body")


class Body(BaseModel):
    """An object of a request. A field that is null counts as absent.

    Attributes:
        names: The fields of this object, by field path of turret.v1. A key that ends in a dot
            stands for all paths with this prefix.
    """

    names: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ClosedBody(Body):
    """An object that rejects unknown fields, because each of them would change the answer."""


@dataclass(slots=True)
class Sent(Generic[M]):
    """The object of a request.

    Attributes:
        body: The model made from the object; None if it has errors.
        wrong: The errors, by field.
        raw: The parsed object, for fields that are needed even if it has errors.
    """

    body: M | None = None
    wrong: list[Violation] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def checked(self, kind: type[_C]) -> _C:
        """The model of the object.

        Raises:
            InvalidRequestError: The object has errors, which the exception lists.
        """
        Violations(list(self.wrong)).raise_if_any()
        assert isinstance(self.body, kind)
        return self.body


def read(model: type[M], raw: dict[str, Any]) -> Sent[M]:
    """Read a parsed object, in time linear in its size."""
    unknown: list[_Unknown] = []
    tidied = _tidied(model, raw, "", unknown)
    wrong: list[Violation] = []
    body = None
    try:
        body = model.model_validate(tidied)
    except ValidationError as error:
        wrong = list(_violations(error))
    # Report only the misspelt field, which is also the cause of errors in the field that it stands
    # for.
    stands_for = tuple(each.meant for each in unknown if each.meant)
    wrong = [each for each in wrong if not _is_within(each[0], stands_for)]
    wrong = [*((each.path, each.why) for each in unknown), *wrong][:MAX_VIOLATIONS]
    return Sent(None if wrong else body, wrong, raw)


def not_one_of(value: Any, choices: str) -> Text:
    """The error for a value that is not one of the choices; a long value is cut."""
    return say("NOT_ONE_OF", value=str(value)[:_MOST_CHARS], choices=choices)


_OTHER_LIST = "a list of other values"


def wrong_type(expected: str, value: Any, of_lists: str = "a list") -> Text:
    """The error for a value of the wrong type; only the type of a list or an object is shown."""
    if isinstance(value, list):
        shown = of_lists
    elif isinstance(value, dict):
        shown = "an object"
    elif isinstance(value, int) and value.bit_length() > 64:
        # Python does not convert the longest numbers to text.
        shown = "such a large number"
    else:
        shown = json.dumps(value[:_MOST_CHARS] if isinstance(value, str) else value)
    return say("WRONG_TYPE", expected=expected, value=shown)


def wrong_at(text: Text, *place: str | int) -> ValidationError:
    """The error that a validator raises for a value, or for a place within it."""
    kind = PydanticCustomError("said", "{text}", {"text": text})
    return ValidationError.from_exception_data(
        "value", [InitErrorDetails(type=kind, loc=place, input=None)]
    )


# Fields that are rejected or ignored.


def unsupported(*neutral: Any, instead: str = "") -> Any:
    """A field that is rejected, unless its value is null or neutral.

    Args:
        neutral: The values that change nothing.
        instead: The field to use instead.
    """
    note = "Not supported" + (f": use {instead}." if instead else ".")
    return Field(
        None,
        description=note,
        deprecated=True,
        json_schema_extra={"x-neutral": list(neutral), "x-instead": instead},
    )


def ignored() -> Any:
    """A field that other servers support, and that changes nothing here."""
    return Field(None, description="Ignored.", json_schema_extra={"x-ignored": True})


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A field that is rejected before the model reads it; ``meant`` is the path it stands for."""

    path: str
    why: Text
    meant: str = ""


@dataclass(frozen=True, slots=True)
class _FieldOf:
    """A field of a model.

    Attributes:
        inner: The model of the objects that the field contains; None if it contains none.
        is_list: Whether the field contains a list of such objects.
        refused: For a rejected field: its neutral values, and the field to use instead.
        is_used: Whether the field is neither rejected nor ignored.
    """

    inner: type[Body] | None
    is_list: bool
    refused: tuple[list[Any], str] | None
    is_used: bool


@functools.cache
def _fields_of(model: type[Body]) -> dict[str, _FieldOf]:
    found: dict[str, _FieldOf] = {}
    for name, info in model.model_fields.items():
        extra: Any = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        inner, is_list = _model_in(info.annotation)
        refused = (extra["x-neutral"], extra["x-instead"]) if "x-neutral" in extra else None
        found[info.alias or name] = _FieldOf(inner, is_list, refused, not extra)
    return found


def _model_in(annotation: Any) -> tuple[type[Body] | None, bool]:
    """The model that a field contains, directly or in a list, and whether in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        return annotation, False
    for inner, is_list in map(_model_in, get_args(annotation)):
        if inner is not None:
            return inner, is_list or get_origin(annotation) is list
    return None, False


def _tidied(
    model: type[Body], value: dict[str, Any], path: str, found: list[_Unknown]
) -> dict[str, Any]:
    """The object without nulls, unknown fields and ignored fields.

    Ignored fields are dropped, because they could have any size, and the memory limits for waiting
    training commands do not count them. The fields that must not be ignored are added to ``found``.
    """
    fields = _fields_of(model)
    kept: dict[str, Any] = {}
    unknown: list[str] = []
    for name, each in value.items():
        if each is None:
            continue
        if (here := fields.get(name)) is None:
            unknown.append(name)
        elif here.refused is not None:
            neutral, instead = here.refused
            # Compare the types too: 1 equals True in Python.
            if not any(type(each) is type(one) and each == one for one in neutral):
                found.append(_Unknown(path + name, _not_supported(instead)))
        elif not here.is_used:
            continue
        elif here.inner is None:
            kept[name] = each
        elif isinstance(each, dict) and not here.is_list:
            kept[name] = _tidied(here.inner, each, f"{path}{name}.", found)
        elif isinstance(each, list) and here.is_list and len(each) <= _MOST_OBJECTS:
            kept[name] = [
                _tidied(here.inner, one, f"{path}{name}[{index}].", found)
                if isinstance(one, dict)
                else one
                for index, one in enumerate(each)
            ]
        else:
            kept[name] = each
    if len(found) < MAX_VIOLATIONS:
        found.extend(_misspelt(model, unknown[:_MOST_UNKNOWN], value, path))
    return kept


def _not_supported(instead: str) -> Text:
    return say("NOT_SUPPORTED_USE", instead=instead) if instead else say("NOT_SUPPORTED")


def _misspelt(
    model: type[Body], unknown: Iterable[str], sent: dict[str, Any], path: str
) -> Iterator[_Unknown]:
    for name in unknown:
        meant = _meant(model, name) if len(name) <= _MOST_CHARS else ""
        # If the field itself was sent too, the unknown one is not a misspelling of it.
        if meant and sent.get(meant) is None:
            why = say("UNKNOWN_FIELD", name=name, closest=meant)
            yield _Unknown(path + name, why, path + meant)
        elif issubclass(model, ClosedBody):
            shown = name[:_MOST_CHARS]
            yield _Unknown(path + shown, say("UNKNOWN_FIELD", name=shown))


@functools.lru_cache(maxsize=4096)
def _meant(model: type[Body], name: str) -> str:
    """The field that a client meant by an unknown name; "" if no field is similar enough."""
    used = sorted(each for each, here in _fields_of(model).items() if here.is_used)
    return slip_of(name, used)


def slip_of(name: str, choices: Iterable[str]) -> str:
    """The choice that a client probably misspelt as ``name``, or ""."""
    meant = closest(name, choices)
    if meant is None:
        return ""
    one, other = _plain(name), _plain(meant)
    is_alike = SequenceMatcher(None, one, other).ratio() >= _LEAST_RATIO
    # max_new_tokens means max_tokens, but stop_token does not mean stop_token_ids.
    is_as_long = -2 <= len(one) - len(other) <= 3
    is_slip = is_as_long and (is_alike or sorted(one) == sorted(other))
    return meant if is_slip else ""


def _plain(name: str) -> str:
    """The name in lower case, without ``_`` and ``-``, because naming styles differ."""
    return name.lower().replace("_", "").replace("-", "")


# Conversion of pydantic's errors to violations.

_SAID: dict[str, Callable[[dict[str, Any], Any], Text]] = {
    "said": lambda ctx, _: ctx["text"],
    "missing": lambda ctx, _: say("REQUIRED"),
    "string_type": lambda ctx, value: wrong_type("a string", value),
    "bool_type": lambda ctx, value: wrong_type("true or false", value),
    "int_type": lambda ctx, value: wrong_type("an integer", value),
    "float_type": lambda ctx, value: wrong_type("a number", value),
    "list_type": lambda ctx, value: wrong_type("a list", value),
    "dict_type": lambda ctx, value: wrong_type("an object", value),
    "model_type": lambda ctx, value: wrong_type("an object", value),
    "finite_number": lambda ctx, _: say("NUMBER_TOO_LARGE"),
    "greater_than": lambda ctx, value: say("NOT_ABOVE", bound=f"{ctx['gt']:g}", value=value),
    "greater_than_equal": lambda ctx, value: say("TOO_SMALL", least=ctx["ge"], value=value),
    "less_than_equal": lambda ctx, value: say("TOO_LARGE", most=ctx["le"], value=value),
    "too_short": lambda ctx, _: say("TOO_FEW_ENTRIES", least=ctx["min_length"]),
    "too_long": lambda ctx, value: say(
        "TOO_MANY_ENTRIES", most=ctx["max_length"], found=len(value)
    ),
    "string_too_short": lambda ctx, _: say("EMPTY"),
    "string_too_long": lambda ctx, value: say(
        "TOO_MANY_CHARACTERS", most=ctx["max_length"], found=len(value)
    ),
    # pydantic writes the choices as "'a', 'b' or 'c'".
    "literal_error": lambda ctx, value: not_one_of(
        value, ctx["expected"].replace("'", "").replace(" or ", ", ")
    ),
}


def _violations(error: ValidationError) -> Iterator[Violation]:
    for each in error.errors(include_url=False)[:MAX_VIOLATIONS]:
        said = _SAID[each["type"]](each.get("ctx", {}), each["input"])
        yield _path(each["loc"]), said


def _path(places: tuple[str | int, ...]) -> str:
    path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in places)
    return path.removeprefix(".")


def _is_within(path: str, others: tuple[str, ...]) -> bool:
    return any(path == each or path.startswith((f"{each}.", f"{each}[")) for each in others)


# The types of fields.


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def are_token_ids(values: list[Any]) -> bool:
    """Whether all values are unsigned integers of 32 bits. Fast even for a million values."""
    if values and set(map(type, values)) != {int}:
        return False
    try:
        array("I", values)
    except OverflowError:
        return False
    return True


def is_longer(value: Any, most: int) -> bool:
    """Whether a parsed value has more than ``most`` characters as JSON without blanks."""
    return len(to_json(value).decode()) > most


def short(most: int) -> BeforeValidator:
    """A validator that rejects a value that is too long as JSON, or cannot be JSON."""

    def check(value: Any) -> Any:
        _json_text(value, most)
        return value

    return BeforeValidator(check)


def _json_text(value: Any, most: int) -> str:
    if is_longer(value, most):
        raise wrong_at(say("TOO_LONG", most=most))
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        # Numbers such as 1e999 are JSON, but no float holds them.
        raise wrong_at(say("NUMBER_TOO_LARGE")) from None


def _schema_text(value: Any) -> Any:
    """A JSON schema as text. A value that is already text stays unchanged."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise wrong_at(wrong_type("an object", value))
    return _json_text(value, limits.MAX_CONSTRAINT_CHARS)


# Keywords that apply several schemas to one object. If one of these schemas were closed, it would
# reject the properties of the others.
_JOINING = frozenset(
    {"allOf", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "unevaluatedProperties"}
)
_NAMED_SCHEMAS = ("properties", "$defs", "definitions")


def closed(schema: Any) -> Any:
    """A JSON schema whose objects allow only the listed properties, as OpenAI's API reads it.

    Objects with ``additionalProperties`` or ``patternProperties`` stay unchanged. So does the whole
    schema if a part of it applies several schemas to one object.
    """
    return schema if _joins(schema) else _closed(schema)


def _joins(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_joins, schema))
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and not _JOINING.isdisjoint(schema)):
        return True
    return any(
        _joins(list(each.values()) if key in _NAMED_SCHEMAS and isinstance(each, dict) else each)
        for key, each in schema.items()
    )


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, each in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(each, dict):
            each = {name: _closed(one) for name, one in each.items()}
        elif key in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties"):
            each = _closed(each)
        made[key] = each
    if isinstance(schema.get("properties"), dict) and "patternProperties" not in schema:
        made.setdefault("additionalProperties", False)
    return made


def _prompts(value: Any) -> dict[str, str | list[int]]:
    """The prompts in a string, token ids, or a list of either, by their places in the field."""
    # A list of integers is one prompt; an empty list contains no prompt.
    is_one = isinstance(value, str) or (
        isinstance(value, list) and (not value or not isinstance(value[0], str | list))
    )
    values = [value] if is_one else value
    if not isinstance(values, list):
        raise wrong_at(wrong_type("a string, token ids, or a list of either", value))
    if len(values) > MAX_PROMPTS:
        raise wrong_at(say("TOO_MANY_ENTRIES", most=MAX_PROMPTS, found=len(values)))
    for index, each in enumerate(values):
        if isinstance(each, str):
            continue
        place = () if is_one else (index,)
        if each == []:
            raise wrong_at(say("EMPTY"), *place)
        if not isinstance(each, list) or not are_token_ids(each):
            raise wrong_at(wrong_type("a string or token ids", each, _OTHER_LIST), *place)
        if len(each) > MAX_TOKEN_IDS:
            raise wrong_at(say("TOO_MANY_ENTRIES", most=MAX_TOKEN_IDS, found=len(each)), *place)
    return {"" if is_one else f"[{index}]": each for index, each in enumerate(values)}


# The maximum number of parts of one text.
MAX_TEXT_PARTS = 4096


def text_of(value: Any, kinds: Iterable[str], *place: str) -> str:
    """A text, or the joined texts of a list of parts. ``kinds`` are the valid types of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_at(wrong_type("a string or a list of text parts", value), *place)
    _few_parts(value, *place)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in (*kinds,):
            raise wrong_at(say("NOT_TEXT"), *place, index)
        if not isinstance(part.get("text"), str):
            raise wrong_at(wrong_type("a string", part.get("text")), *place, index, "text")
    return "".join(part["text"] for part in value)


def _few_parts(value: Any, *place: str) -> Any:
    if isinstance(value, list) and (found := len(value)) > MAX_TEXT_PARTS:
        raise wrong_at(say("TOO_MANY_ENTRIES", most=MAX_TEXT_PARTS, found=found), *place)
    return value


def text_or_list(things: str, wrap: Callable[[str], Any], schema: Any) -> BeforeValidator:
    """A validator that also accepts a text; ``wrap`` turns it into the only entry of the list."""

    def check(value: Any) -> Any:
        if not isinstance(value, str | list):
            raise wrong_at(wrong_type(f"a string or a list of {things}", value))
        return [wrap(value)] if isinstance(value, str) else value

    return BeforeValidator(check, json_schema_input_type=str | schema)


class TextPart(BaseModel):
    """A part of a text."""

    type: Literal["text"]
    text: str


class ItemPart(TextPart):
    type: Literal["input_text", "output_text", "text"]  # type: ignore[assignment]


_Parts = Field(max_length=MAX_TEXT_PARTS)
ITEM_PARTS = ("input_text", "output_text", "text")

Number = Annotated[float, Field(strict=True)]
Int = Annotated[int, BeforeValidator(_integral)]
# A count, lowered to the largest number that fits a message; the context limit rejects it anyway.
Count = Annotated[Int, AfterValidator(lambda value: min(value, UINT32))]
Texts = Annotated[list[str], Field(fail_fast=True)]
StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_STRING_CHARS)]],
    Field(fail_fast=True),
    text_or_list("strings", str, Annotated[list[str], Field(max_length=limits.MAX_STOP_STRINGS)]),
]
TokenId = Annotated[int, Field(ge=0, le=UINT32)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKEN_IDS, fail_fast=True)]
_Several = Annotated[list[str | TokenIds], Field(max_length=MAX_PROMPTS)]
Prompts = Annotated[
    dict[str, str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | TokenIds | _Several),
]
Schema = Annotated[str, BeforeValidator(_schema_text, json_schema_input_type=dict[str, Any] | str)]
ClosedSchema = Annotated[
    Schema,
    BeforeValidator(
        lambda value: value if is_longer(value, limits.MAX_CONSTRAINT_CHARS) else closed(value)
    ),
]
Content = Annotated[
    str,
    BeforeValidator(
        lambda value: text_of(value, ("text",)),
        json_schema_input_type=str | Annotated[list[TextPart], _Parts],
    ),
]
# The item that contains the content reads it later, because only some items have text as content.
ItemContent = Annotated[
    Any,
    BeforeValidator(_few_parts, json_schema_input_type=str | Annotated[list[ItemPart], _Parts]),
]
Function = Literal["function"]
