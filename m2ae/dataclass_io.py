"""Dataclasses from plain dictionaries, as JSON and YAML give them, and back.

The dataclass is the schema: every key must be a field, every value must have the field's type.
A typing mistake in a file is an error that names the place and the nearest right word.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def to_dict(instance: "DataclassInstance") -> dict[str, Any]:
    """A dataclass as nested dictionaries and lists, ready for JSON or YAML.

    Args:
        instance: a dataclass whose fields are plain values, tuples, lists, dicts or dataclasses.

    Returns:
        One key per field, in the order of the fields; `from_dict` gives an equal instance back.
    """
    return {f.name: _plain(getattr(instance, f.name)) for f in dataclasses.fields(instance)}


def from_dict(cls: type[T], data: Mapping[str, Any], *, path: str = "") -> T:
    """Build a dataclass from nested dictionaries.

    Args:
        cls: the dataclass. Field types may be bool, int, float, str, None, Literal, unions, other
            dataclasses, and tuple, list or dict of these.
        data: one key per field; fields with a default may be left out.
        path: where `data` stands, for messages; the class's name if empty.

    Returns:
        The instance. Lists become tuples where the field says tuple, and integers become floats
        where it says float; nothing else is converted, no string to a number in particular.

    Raises:
        ValueError: a key is no field (the nearest field is named), a field without default is
            missing, a Literal has another value, a tuple another length, or the dataclass's own
            `__post_init__` refuses.
        TypeError: a value has another type than its field.
    """
    path = path or cls.__name__
    if not isinstance(data, Mapping):
        raise TypeError(f"{path}: expected keys and values, got {_fact(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    types_of = get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise ValueError(f"{path}: expected only known keys, got {key!r}; {hint(key, fields)}")
    for name, f in fields.items():
        no_default = f.default is f.default_factory is dataclasses.MISSING
        if no_default and name not in data:
            raise ValueError(f"{path}.{name}: expected a value, got none")
    values = {key: _convert(data[key], types_of[key], f"{path}.{key}") for key in data}
    return cls(**values)


def hint(word: object, known: Iterable[str]) -> str:
    """What to try instead of an unknown `word`: the nearest of `known`, or all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(known))}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _convert(value: Any, kind: Any, path: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_dict(kind, value, path=path)
    if origin is Literal:
        return _convert_literal(value, args, path)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, path)
    if origin is tuple and isinstance(value, list | tuple):
        return _convert_tuple(value, args, path)
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, args[1], f"{path}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, but True is no number of layers
    if (
        isinstance(kind, type)
        and isinstance(value, kind)
        and (type(value) is not bool or kind is bool)
    ):
        return value
    raise TypeError(f"{path}: expected {_name(kind)}, got {_fact(value)}{_cure(value, kind)}")


def _convert_literal(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    if value in choices:
        return value
    words = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"{path}: expected {words}, got {value!r}; {hint(value, map(str, choices))}")


def _convert_union(value: Any, kinds: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:  # X | None: X's own message says more
        return _convert(value, kinds[0], path)
    for kind in kinds:
        try:
            return _convert(value, kind, path)
        except TypeError:
            continue
    raise TypeError(f"{path}: expected {' or '.join(map(_name, kinds))}, got {_fact(value)}")


def _convert_tuple(value: list[Any] | tuple[Any, ...], args: tuple[Any, ...], path: str) -> Any:
    if len(args) == 2 and args[1] is ...:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise ValueError(f"{path}: expected {len(args)} values, got {len(value)}: {list(value)}")
    pairs = zip(value, args, strict=True)
    return tuple(_convert(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(pairs))


def _name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _fact(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _cure(value: Any, kind: Any) -> str:
    if kind is float and isinstance(value, str):
        try:
            number = repr(float(value))
            number = number if "." in number else number.replace("e", ".0e")  # 1e-05, too
            return f"; write {number}: YAML reads numbers like 1e-3 as text"
        except ValueError:
            return ""
    return ""
