"""Objectives: which rounds of a rollout a trainer scores. Tensors only. One objective per file; one line here names
it."""

from collections.abc import Callable
from typing import Protocol

import torch

from ...types import Round
from .trace import TraceObjective


class Objective(Protocol):
    r"""
    What an objective is: a callable, plain function or dataclass.

    It gets the rows of a micro-batch, `{"prompt_ids" (B, P), "prompt_mask" (B, P), "canvas_ids" (B, R), "canvas_mask"
    (B, R), "step_map" (B, R), "scored" (B, R)}`, and the block length (`None`: full attention), and returns at least
    one [`Round`]. It is called for old, reference and policy log-probabilities and must return the same rounds each
    time.

    `replays_rollout = True` promises that every token is scored once and in exactly the context it was committed in,
    so that rollout log-probabilities can be compared with the trainer's. Without the attribute, the answer is no.

    `attentions`, a tuple of `"block"` and `"full"`, says which kinds of attention it is for. Without it: both.
    """

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]: ...


OBJECTIVES: dict[str, Callable[..., Objective]] = {"trace": TraceObjective}


def make_objective(objective: str | Objective, **options) -> Objective:
    """The objective of that name, built with `options`; anything else than a name is returned as it is."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be a callable or one of {sorted(OBJECTIVES)}, but is {objective!r}.")
    return OBJECTIVES[objective](**options)
