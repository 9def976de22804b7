"""Semi-autoregressive SFT: one slice of each response is denoised; what comes after it is all masked."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Grid, Round, Rows
from .base import Objective, Random
from .block_mask import mask_probability


def slice_round(slices: torch.Tensor, current: torch.Tensor, drawn: torch.Tensor, trained: torch.Tensor) -> Round:
    """Masks the tokens `drawn` of each row's `current` `(B, 1)` slice and all later ones, scores the trained ones
    among the drawn."""
    mine = (slices == current) & drawn
    return Round(masked=mine | (slices > current), scored=mine & trained)


def slices_of(rows: Rows, length: int) -> torch.Tensor:
    """Slice `(B, R)` of `length` tokens of each response token: counted from the response start, or in the order of a
    step map."""
    exists = rows.canvas_mask.bool()
    order = torch.arange(exists.size(1), device=exists.device).expand(exists.shape)
    if rows.step_map is not None:
        never = torch.iinfo(rows.step_map.dtype).max
        order = rows.step_map.masked_fill(rows.step_map < 0, never).argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(exists, Grid(length, "response").block(order), -1)


@dataclass
class SemiAutoregressiveObjective(Objective):
    r"""
    Draws a slice of `block_length` tokens of each response and masks its trained tokens with probability p, at least
    one of them. Everything after the slice is masked. A row's loss is the mean over the tokens scored.

    Args:
        block_length (`int`):
            Tokens of a slice.
        eps (`float`, *optional*, defaults to `1e-3`):
            Smallest mask probability.
        largest (`float`, *optional*, defaults to `1.0`):
            Largest mask probability.
    """

    attentions: ClassVar[tuple[str, ...]] = ("full",)
    loss_norm: ClassVar[str] = "sequence"
    needs_block_length: ClassVar[bool] = True
    step_map: ClassVar[str] = "optional"

    block_length: int
    eps: float = 1e-3
    largest: float = 1.0

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        pair = rows.trained.any(1, keepdim=True).expand(-1, 2)  # which slice, and how much of it
        return {"level": random.levels(pair), "uniform": random.uniform(rows.trained)}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        trained, slices = rows.trained, slices_of(rows, self.block_length)
        which, level = rows.draws["level"].split(1, dim=1)

        # One of the slices that have something to train
        has = torch.zeros_like(slices).scatter_reduce(1, slices.clamp(min=0), trained.long(), "amax")
        place = (which * has.sum(1, keepdim=True)).long() + 1
        current = (has * has.cumsum(1) == place).long().argmax(1, keepdim=True)

        uniform = rows.draws["uniform"].masked_fill(~trained | (slices != current), 2.0)
        drawn = uniform < mask_probability(level, self.eps, self.largest)
        drawn = trained & (drawn | (uniform == uniform.amin(1, True)))
        # What is not trained but follows a trained token in the slice is not known yet
        hidden = ~trained & ((trained & (slices == current)).cumsum(1) > 0)
        round_ = slice_round(slices, current, drawn | hidden, trained)
        count = round_.scored.sum(1, keepdim=True).clamp(min=1)
        return [Round(round_.masked, round_.scored, (trained.sum(1, keepdim=True) / count).expand(trained.shape))]
