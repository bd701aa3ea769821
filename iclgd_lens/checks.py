"""Checks of arguments, in one wording: an error names the argument, what is allowed, and what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

from jaxtyping import Num
from torch import Tensor

T = TypeVar("T")


def require_one_of(name: str, given: object, allowed: Sequence[str]) -> None:
    """Check that an argument is one of several words.

    Raises:
        ValueError: If it is not.
    """
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {given!r}")


def require_some_of(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Check that an argument names only what is known.

    Raises:
        ValueError: If it does not, with the first name that is unknown.
    """
    if unknown := [each for each in given if each not in allowed]:
        raise ValueError(f"{name} must be some of {', '.join(allowed)}; got {unknown[0]!r}")


def in_order(name: str, given: Iterable[T]) -> tuple[T, ...]:
    """Take the items of an argument once, as a tuple: a generator can be read only once.

    Args:
        name: The argument.
        given: The items, in an order that means something.

    Raises:
        ValueError: If they are a set, whose order differs from process to process, a mapping, one text, or not several items.
    """
    if isinstance(given, set | frozenset):
        raise ValueError(
            f"{name} must be given in an order, and a set has another one in every process; give a list: got {given!r}"
        )
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{name} must be several items in an order, such as a list; got {type(given).__name__} {given!r}")
    return tuple(given)


def as_whole(name: str, given: Any, least: int = 0) -> int:
    """Take an argument as a whole number.

    Args:
        name: The argument.
        given: A whole number, of Python, of NumPy, or in a tensor without dimensions.
        least: The smallest number that is allowed.

    Raises:
        ValueError: If it is something else: smaller, a float, or true or false.
    """
    if isinstance(given, Tensor) and given.ndim == 0:
        given = given.item()
    if not isinstance(given, Integral) or isinstance(given, bool) or given < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {given!r}")
    return int(given)


def require_bool(name: str, given: object) -> None:
    """Check that an argument is true or false.

    Raises:
        ValueError: If it is anything else, such as a text.
    """
    if not isinstance(given, bool):
        raise ValueError(f"{name} must be True or False, got {given!r}")


def require_count(name: str, given: object) -> None:
    """Check that an argument is a whole number of at least 1.

    Raises:
        ValueError: If it is not.
    """
    if not is_whole(given) or given < 1:
        raise ValueError(f"{name} must be at least 1, got {given!r}")


def require_seed(given: object) -> int:
    """Check that the argument `seed` can seed a draw: a whole number that torch's generators take.

    Returns:
        The seed as Python's own integer.

    Raises:
        ValueError: If it is something else: a fraction, text, None, a truth value or a tensor.
    """
    if not is_whole(given) or not -(2**63) <= given < 2**64:
        raise ValueError(f"seed must be a whole number from -2**63 to 2**64 - 1, got {given!r}")
    return int(given)


def require_positive(name: str, given: object) -> None:
    """Check that an argument is a finite number above 0.

    Raises:
        ValueError: If it is not.
    """
    if not _finite(given) or given <= 0:
        raise ValueError(f"{name} must be a number, finite and above 0; got {given!r}")


def require_not_negative(name: str, given: object) -> None:
    """Check that an argument is a finite number of at least 0.

    Raises:
        ValueError: If it is not.
    """
    if not _finite(given) or given < 0:
        raise ValueError(f"{name} must be a number, finite and not negative; got {given!r}")


def require_finite(name: str, given: Num[Tensor, "*shape"]) -> None:
    """Check that every entry of a tensor is finite.

    Raises:
        ValueError: If one is not, with how many are not.
    """
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name} has {int((~given.isfinite()).sum())} of {given.numel()} entries that are not finite")


def is_whole(given: object) -> TypeGuard[int]:
    """Whether an argument is a whole number; a truth value, which is one to Python, is none here."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def _finite(given: object) -> TypeGuard[float]:
    return isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given)
