"""TraceRL: every response token is scored once, in the context it was committed in."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...types import Round


def trace_rounds(
    step_map: torch.Tensor,
    scored: torch.Tensor,
    *,
    first_len: torch.Tensor | None = None,
    block_length: int | None = None,
    shrink: int = 1,
) -> list[Round]:
    r"""
    Replays a rollout. Round `r` masks what was still masked at the `r`-th (shrunk) step and scores what it committed.

    Args:
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Denoising step at which each token was committed, -1 where there is no token.
        scored (`torch.BoolTensor` of shape `(B, R)`):
            Tokens that count. The others are masked and revealed with their step, but never scored.
        first_len (`torch.LongTensor` of shape `(B,)`, *optional*):
            Tokens of the first response block: `block_length - prompt_length % block_length`.
        block_length (`int`, *optional*):
            Block attention: a round serves the `r`-th step of every block at once. `None`: full attention, one round
            per step of the whole response.
        shrink (`int`, *optional*, defaults to `1`):
            Merges every `shrink` neighbouring steps of a block (of the response) into the last of them.

    Returns:
        `list[Round]`: At least one round. Together they score every token of `scored` once.
    """
    exists = step_map >= 0
    block = torch.zeros_like(step_map)
    if block_length is not None:
        columns = torch.arange(step_map.size(1), device=step_map.device)
        block = (columns + block_length - first_len.unsqueeze(1)) // block_length

    # Rank of each token's step among the distinct steps of its block, by sorting (row, block, step) once.
    rows = torch.arange(step_map.size(0), device=step_map.device).unsqueeze(1)
    unit = rows * (step_map.size(1) + 1) + block
    key = unit * (step_map.max() + 2) + step_map + 1
    _, order = torch.unique(torch.where(exists, key, -1), return_inverse=True)
    first = torch.full((int(unit.max()) + 1,), key.numel(), device=step_map.device)
    first.scatter_reduce_(0, unit[exists], order[exists], "amin")
    turn = torch.where(exists, (order - first[unit]) // shrink, -1)

    num_rounds = max(int(turn.max()) + 1, 1)
    return [Round(masked=turn >= r, scored=(turn == r) & scored.bool()) for r in range(num_rounds)]


def step_map_from_history(canvases: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Step map of canvases `(T, ..., R)` recorded after each step: the first that shows a token there, -1 where none
    does."""
    shown = canvases != mask_token_id
    return torch.where(shown.any(0), shown.int().argmax(0), -1)


@dataclass
class TraceObjective:
    """The rounds of TraceRL as a training objective. `shrink` as in [`trace_rounds`]."""

    attentions: ClassVar[tuple[str, ...]] = ("block", "full")

    shrink: int = 1

    @property
    def replays_rollout(self) -> bool:
        return self.shrink == 1

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]:
        first_len = None if block_length is None else block_length - batch["prompt_mask"].sum(1) % block_length
        return trace_rounds(
            batch["step_map"], batch["scored"], first_len=first_len, block_length=block_length, shrink=self.shrink
        )
