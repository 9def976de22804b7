"""Counts of the trainers' configs, checked when the config is made."""

from numbers import Integral
from typing import Any


def is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Raises a `ValueError` if a field of that name is neither `None` nor an integer of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not is_count(value, least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, but is {value!r}.")
