"""Dataclasses from plain JSON values, by their annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decode(cls: type[T], values: Any) -> T:
    """An instance of a frozen dataclass of numbers, texts, tuples, dicts, options and other such dataclasses.

    Fields with a default may be missing. KeyError: another one is; ValueError: a field is unknown or of a wrong type.
    """
    found: T = _value(cls, values, cls.__name__)
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _value(inner, value, name)
    if is_dataclass(kind):
        return _instance(kind, value, name)
    if origin in (tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} is no list")
        each = arguments[:1] * len(value) if len(arguments) == 1 or arguments[-1] is ... else arguments
        if len(each) != len(value):
            raise ValueError(f"{name} has {len(value)} values instead of {len(each)}")
        return tuple(_value(inner, item, name) for inner, item in zip(each, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
        return {key: _value(arguments[1], item, name) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r} and should be {kind.__name__}")
    return value


def _instance(kind: Any, values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is no object")
    hints, known = _hints(kind), {field.name: field for field in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name} has an unknown field {unknown[0]!r}")
    found = {}
    for field in known.values():
        if field.name in values:
            found[field.name] = _value(hints[field.name], values[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return kind(**found)
