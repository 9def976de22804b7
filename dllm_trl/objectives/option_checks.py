"""Checks of the options that objectives have in common, at construction."""

import math
from numbers import Integral, Real
from typing import Any


def check_counts(objective: Any, *names: str) -> None:
    """Raises if an option is no integer of at least 1."""
    for name in names:
        value = getattr(objective, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")


def check_choices(objective: Any, **choices: tuple[str, ...]) -> None:
    """Raises if an option is none of its choices."""
    for name, known in choices.items():
        if getattr(objective, name) not in known:
            raise ValueError(f"`{name}` must be one of {known}, but is {getattr(objective, name)!r}.")


def check_shares(objective: Any, *names: str) -> None:
    """Raises if options are no numbers in [0, 1], or not in ascending order."""
    values = [getattr(objective, name) for name in names]
    right = all(isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1 for value in values)
    if not right or sorted(values) != values:
        order = " <= ".join(("0", *names, "1"))
        said = ", ".join(f"`{name}={value!r}`" for name, value in zip(names, values, strict=True))
        raise ValueError(f"{said}: must be {order}.")


def check_weights(objective: Any, *names: str) -> None:
    """Raises if an option is no finite number of at least 0."""
    for name in names:
        value = getattr(objective, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number of at least 0, but is {value!r}.")


def check_positive(objective: Any, *names: str) -> None:
    """Raises if an option is not above 0."""
    for name in names:
        if not getattr(objective, name) > 0:
            raise ValueError(f"`{name}` must be above 0, but is {getattr(objective, name)!r}.")
