"""Random messages of any type, drawn from their descriptors, so that new fields are included."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_F = FieldDescriptor
_INT64 = (_F.CPPTYPE_INT64, _F.CPPTYPE_UINT64)
# Words with a meaning to the server (adapters, paths, methods, files, roles), and odd texts.
_WORDS = (
    *("", "a", "b", "a" * 129, "x" * 5000, "adapter_config.json", "adapter_model.safetensors"),
    *("lora", "svd", "exact", "ties", "linear", "user", "system", "assistant", "total", "../a"),
    *("/etc", "a/../b", "a\0b", "ÿ\u0301", "\u202e", "<|im_end|>", "%s%n", "big", "0" * 64),
)
_EDGES = (0, 1, 2, 3, 16, 64, 255, 256, 1000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_WIDE = (1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-45, 1e30, 3.4e38)
_ODD = (float("nan"), float("inf"), float("-inf"))


def _integers(least: int, most: int) -> st.SearchStrategy[int]:
    edges = {sign * edge for edge in (*_EDGES, *_WIDE) for sign in (1, -1)}
    kept = sorted(edge for edge in edges if least <= edge <= most)
    return st.one_of(st.sampled_from(kept), st.integers(max(least, -8), 300))


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind == _F.CPPTYPE_STRING:
        text = st.one_of(st.sampled_from(_WORDS), st.text(max_size=20))
        if field.type == _F.TYPE_BYTES:
            return text.map(lambda each: each.encode())
        return text
    if kind == _F.CPPTYPE_BOOL:
        return st.booleans()
    if kind == _F.CPPTYPE_ENUM:
        # Unknown enum numbers: proto3 keeps them, so they reach the server.
        assert field.enum_type is not None
        values = [value.number for value in field.enum_type.values]
        return st.sampled_from([*values, 99, -1])
    if kind in (_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE):
        return st.sampled_from([*_FLOATS, *_ODD])
    bits = 64 if kind in _INT64 else 32
    if kind in (_F.CPPTYPE_UINT32, _F.CPPTYPE_UINT64):
        return _integers(0, (1 << bits) - 1)
    return _integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is None:
        return _scalars(field)
    return messages_of(field.message_type, depth + 1)


@st.composite
def _drawn(draw: st.DrawFn, descriptor: Descriptor, depth: int) -> Message:
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            for key in draw(st.lists(_scalars(entry["key"]), max_size=3)):
                getattr(message, field.name)[key] = draw(_scalars(entry["value"]))
        elif field.is_repeated:
            items = draw(st.lists(_values(field, depth), max_size=3))
            # Sometimes draw more entries than any limit allows.
            items *= draw(st.sampled_from((1, 1, 1, 1, 1, 40, 2000)))
            getattr(message, field.name).extend(items)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(_values(field, depth)))
        else:
            setattr(message, field.name, draw(_values(field, depth)))
    return message


def messages_of(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of a type. In a ``oneof``, the last drawn field stays."""
    if depth > 4:
        return st.builds(GetMessageClass(descriptor))
    return _drawn(descriptor, depth)
