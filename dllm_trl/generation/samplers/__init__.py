"""
One remasking strategy per file. A strategy is a function

    sampler(scores, masked, quota, **kwargs) -> commit

that says which masked tokens of each block are committed in this step:

- `scores` ([`TokenScores`]): `confidence`, `entropy`, `margin`, `uniform`, `committed`, each `(B, W)` float32.
- `masked` `(B, W)` bool: positions still masked.
- `quota` `(B,)` long: tokens the schedule asks for in this step (it may exceed the masked ones).
- `commit` `(B, W)` bool: a subset of `masked`, not empty where the quota is all that is masked.

One with parameters is a dataclass whose instances are called with the first three. Its fields have defaults, and are
arguments of [`DiffusionGenerationConfig`], of `generate` and of the trainers' configs by their names; `__post_init__`
checks their range. In a field's metadata, `help` is the trainers' help and `elsewhere` are names that other code bases
have for it. A function gets all of these parameters as `kwargs`.
"""

from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from functools import partial
from typing import Any

import torch

from .bacd import BoundedAdaptive
from .common import TokenScores, built, checked, top_quota
from .entropy import entropy
from .entropy_bound import EntropyBound
from .low_confidence_dynamic import LowConfidenceDynamic
from .low_confidence_static import low_confidence_static
from .margin import margin
from .random import random
from .sequential import sequential


SAMPLERS = {
    "sequential": sequential,
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": LowConfidenceDynamic,
    "random": random,
    "entropy": entropy,
    "margin": margin,
    "entropy_bound": EntropyBound,
    "bacd": BoundedAdaptive,
}


def with_parameters() -> list[type]:
    return [sampler for sampler in SAMPLERS.values() if is_dataclass(sampler)]


def parameters(strategy: str | Callable | None = None) -> dict[str, Field]:
    """The parameters of all strategies by their names; of those that share a name, `strategy`'s counts."""
    chosen = [kind for kind in with_parameters() if kind is strategy or kind is SAMPLERS.get(str(strategy))]
    return {field.name: field for kind in (*with_parameters(), *chosen) for field in fields(kind)}


def make_sampler(strategy: str | Callable, values: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """The strategy as the decoding loop calls it, with its parameters from `values`."""
    sampler = SAMPLERS[strategy] if isinstance(strategy, str) else strategy
    if not is_dataclass(sampler):
        sampler = partial(sampler, **{name: values[name] for name in parameters()})
    elif isinstance(sampler, type):
        sampler = built(sampler, values)
    return sampler if isinstance(strategy, str) else checked(sampler)


__all__ = ["SAMPLERS", "TokenScores", "checked", "make_sampler", "parameters", "top_quota", "with_parameters"]
