"""Values: frozen dataclasses that are edited by copy and written down as plain data."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, cast

import torch

from kvbind.files import check_plain


def nearest(name: object, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to `name`, or an empty string where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{argument} must be one of {words}; got {value!r}{nearest(value, allowed)}")


_VALUES_COUNT: ContextVar[bool] = ContextVar("values count", default=True)


def values_checked() -> bool:
    """Whether tensors are looked into for values that are not finite, where that is cheap."""
    return _VALUES_COUNT.get()


@contextmanager
def unchecked_values() -> Iterator[None]:
    """Let values that are not finite through, to a loss that shows them: for weights that a model computes by itself."""
    token = _VALUES_COUNT.set(False)
    try:
        yield
    finally:
        _VALUES_COUNT.reset(token)


def check_bool(argument: str, value: object) -> None:
    """Raise `TypeError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False; got {value!r} ({type(value).__name__})")


def check_positive(argument: str, value: object) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a number above 0; got {value!r} ({type(value).__name__})")
    if not 0 < value < float("inf"):
        raise ValueError(f"{argument} must be a finite number above 0; got {value}")


def check_positive_int(argument: str, value: object) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int of at least 1; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{argument} must be an int of at least 1; got {value}")


LATER = {"later": True}
"""Metadata of a field that came later than files that others have kept: `to_dict` leaves it out where it has its default."""


class Value:
    """Base of every spec-like value: a frozen dataclass with `replace`, `to_dict`, `from_dict` and a short `repr`."""

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(field.name for field in dataclasses.fields(cast(Any, cls)))

    @classmethod
    def _check_fields(cls, names: Iterable[str]) -> None:
        known = cls.field_names()
        for name in names:
            if name not in known:
                names = ", ".join(known) or "none"
                raise TypeError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}; its fields are {names}")

    def replace(self, **fields: Any) -> Self:
        """A copy of this value with the given fields changed; the copy is validated anew.

        Raises:
            TypeError: a name that is no field.
            ValueError: a field's value that does not fit.
        """
        self._check_fields(fields)
        return cast(Self, dataclasses.replace(cast(Any, self), **fields))

    def differing(self, other: Self) -> list[str]:
        """The names of the fields in which this value and `other` differ."""
        return [name for name in self.field_names() if getattr(self, name) != getattr(other, name)]

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """The values of the fields in which this value and `other` differ, by name; those of values inside dotted."""
        found: dict[str, tuple[Any, Any]] = {}
        for name in self.differing(other):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not isinstance(mine, Value) or not isinstance(theirs, Value):
                found[name] = mine, theirs
            elif type(mine) is type(theirs):
                found |= {f"{name}.{inner}": both for inner, both in mine.differences(theirs).items()}
            else:
                found[name] = mine, theirs
        return found

    def said(self) -> dict[str, Any]:
        """The fields that must be given to make this value: those without a default, and those that differ from theirs."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(cast(Any, self))
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.said().items())})"

    def to_dict(self) -> dict[str, Any]:
        """This value as plain data (dicts, lists, strings, numbers), as YAML and JSON hold it.

        Fields that are `LATER` are left out at their defaults, so that values of earlier versions read the same.
        """
        fields = dataclasses.fields(cast(Any, self))
        left_out = {
            field.name for field in fields if field.metadata.get("later") and getattr(self, field.name) == field.default
        }
        return {name: to_plain(getattr(self, name)) for name in self.field_names() if name not in left_out}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The value that `to_dict` wrote; fields that are left out take their defaults.

        Raises:
            TypeError: `data` is no dict, or names an unknown field.
            ValueError: a field's value does not fit.
        """
        if not isinstance(data, dict):
            raise TypeError(f"{cls.__name__}.from_dict needs a dict; got {type(data).__name__}")
        check_plain(data, f"{cls.__name__}.from_dict's dict", values=True, wide=False)
        cls._check_fields(data)
        return cls(**data)


def to_plain(value: Any) -> Any:
    """`value` with nested `Value`s, tuples and dtypes turned into plain data."""
    if isinstance(value, Value):
        return value.to_dict()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value
