"""TraceRL: every response token is scored once, in the context it was committed in."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import Objective


def trace_rounds(
    step_map: torch.Tensor, trained: torch.Tensor, *, blocks: torch.Tensor | None = None, shrink: int = 1
) -> list[Round]:
    r"""
    Replays a rollout. Round `r` masks what was still masked at the `r`-th (shrunk) step and scores what it committed.

    Args:
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Denoising step at which each token was committed, -1 where there is no token.
        trained (`torch.BoolTensor` of shape `(B, R)`):
            Tokens that count. The others are masked and revealed with their step, but never scored.
        blocks (`torch.LongTensor` of shape `(B, R)`, *optional*):
            Block attention: block of each token; a round serves the `r`-th step of every block at once. `None`: full
            attention, one round per step of the whole response.
        shrink (`int`, *optional*, defaults to `1`):
            Merges every `shrink` neighbouring steps of a block (of the response) into the last of them.

    Returns:
        `list[Round]`: At least one round. Together they score every token of `trained` once.
    """
    exists = step_map >= 0
    blocks = torch.zeros_like(step_map) if blocks is None else blocks - blocks[:, :1]

    # Rank of each token's step among the distinct steps of its block, by sorting (row, block, step) once.
    rows = torch.arange(step_map.size(0), device=step_map.device).unsqueeze(1)
    unit = rows * (step_map.size(1) + 1) + blocks
    key = unit * (step_map.max() + 2) + step_map + 1
    _, order = torch.unique(torch.where(exists, key, -1), return_inverse=True)
    first = torch.full((int(unit.max()) + 1,), key.numel(), device=step_map.device)
    first.scatter_reduce_(0, unit[exists], order[exists], "amin")
    turn = torch.where(exists, (order - first[unit]) // shrink, -1)

    num_rounds = max(int(turn.max()) + 1, 1)
    return [Round(masked=turn >= r, scored=(turn == r) & trained.bool()) for r in range(num_rounds)]


def merged_steps(rows: Rows, rounds: list[Round]) -> torch.Tensor:
    """
    Step `(B, R)` of each token that `rounds` of [`trace_rounds`] score, -1 elsewhere: the largest of those that
    `shrink` has merged.
    """
    turns = sum(number * one.scored for number, one in enumerate(rounds))
    scored = torch.stack([one.scored for one in rounds]).any(0)
    if rows.grid.attention == "block":
        turns = turns + len(rounds) * (rows.blocks - rows.blocks[:, :1])
    steps = rows.step_map.masked_fill(~scored, -1)
    largest = steps.new_full((len(steps), int(turns.max()) + 1), -1).scatter_reduce(1, turns, steps, "amax")
    return largest.gather(1, turns).masked_fill(~scored, -1)


def step_map_from_history(canvases: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Step map of canvases `(T, ..., R)` recorded after each step: the first that shows a token there, -1 where none
    does."""
    shown = canvases != mask_token_id
    return torch.where(shown.any(0), shown.int().argmax(0), -1)


@dataclass
class TraceObjective(Objective):
    """The rounds of TraceRL, on rollouts or (trace SFT) on recorded responses. `shrink` as in [`trace_rounds`]."""

    step_map: ClassVar[str] = "required"
    partial: ClassVar[bool] = False
    fills: ClassVar[bool] = False

    shrink: int = 1

    @property
    def replays_rollout(self) -> bool:
        return self.shrink == 1

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        blocks = rows.blocks if rows.grid.attention == "block" else None
        return trace_rounds(rows.step_map, rows.trained, blocks=blocks, shrink=self.shrink)
