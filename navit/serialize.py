"""Frozen configuration dataclasses <-> plain JSON values, unions of dataclasses included."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turn a configuration into JSON values; every dataclass carries its class name as ``type``."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
        return {"type": type(value).__name__, **plain}
    if isinstance(value, Mapping):
        return {str(name): to_plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[T], plain: Mapping[str, Any]) -> T:
    """Build a configuration of class ``kind`` from what `to_plain` made; its checks run again.

    Raises:
        ValueError: If a name is unknown to the class, as in a file of another version.
    """
    hints = get_type_hints(kind)
    given = {name: value for name, value in plain.items() if name != "type"}
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        raise ValueError(
            f"{kind.__name__} has the settings {sorted(hints)}; got the unknown {unknown}. The "
            "file was written by another version, or edited."
        )
    return kind(**{name: _build(hints[name], value) for name, value in given.items()})


def _build(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _build_union(args, value)
    if isinstance(hint, type) and is_dataclass(hint):
        return from_plain(hint, value)
    if origin is tuple:
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(_build(kind, part) for kind, part in zip(kinds, value, strict=True))
    if origin is Literal or hint is Any:
        return value
    if hint is Path:
        return Path(value)
    return float(value) if hint is float else value


def _build_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, Mapping):
        named = {k.__name__: k for k in kinds if isinstance(k, type) and is_dataclass(k)}
        name = value.get("type")
        if name not in named:
            raise ValueError(f"type must be one of {sorted(named)}; got {name!r}.")
        return from_plain(named[name], value)
    if isinstance(value, list):
        tuples = [kind for kind in kinds if get_origin(kind) is tuple]
        return _build(tuples[0], value) if tuples else value
    plain = [kind for kind in kinds if kind is not type(None) and not is_dataclass(kind)]
    exact = [kind for kind in plain if isinstance(kind, type) and isinstance(value, kind)]
    return _build((exact or plain)[0], value)
