"""Semi-autoregressive SFT: one slice of each response is denoised; what comes after it is all masked."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...types import Round
from .block import mask_probability


def slice_round(slices: torch.Tensor, current: torch.Tensor, drawn: torch.Tensor, scored: torch.Tensor) -> Round:
    """Masks the tokens `drawn` of each row's `current` `(B, 1)` slice and all later ones, scores the drawn."""
    mine = (slices == current) & drawn
    return Round(masked=mine | (slices > current), scored=mine & scored)


def slices_of(batch: dict[str, torch.Tensor], block_length: int) -> torch.Tensor:
    """Slice `(B, R)` of each response token: counted from the response start, or in the order of a `step_map`."""
    exists = batch["canvas_mask"].bool()
    order = torch.arange(exists.size(1), device=exists.device).expand(exists.shape)
    if "step_map" in batch:
        steps = batch["step_map"]
        never = torch.iinfo(steps.dtype).max
        order = steps.masked_fill(steps < 0, never).argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(exists, order // block_length, -1)


@dataclass
class SemiAutoregressiveObjective:
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

    def num_levels(self, batch: dict[str, torch.Tensor], block_length: int | None) -> torch.Tensor:
        return 2 * batch["scored"].any(1).long()  # which slice, and how much of it

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]:
        scored = batch["scored"]
        slices = slices_of(batch, self.block_length)
        which, level = torch.zeros(2, len(scored), 1, device=scored.device)
        trained = scored.any(1)
        which[trained, 0], level[trained, 0] = batch["levels"].view(-1, 2).T.to(which)

        # One of the slices that have something to train
        has = torch.zeros_like(slices).scatter_reduce(1, slices.clamp(min=0), scored.long(), "amax")
        place = (which * has.sum(1, keepdim=True)).long() + 1
        current = (has * has.cumsum(1) == place).long().argmax(1, keepdim=True)

        uniform = torch.full(scored.shape, 2.0, device=scored.device)
        uniform[scored] = batch["uniform"].to(uniform)
        uniform = uniform.masked_fill(slices != current, 2.0)
        drawn = uniform < mask_probability(level, self.eps, self.largest)
        drawn = scored & (drawn | (uniform == uniform.amin(1, True)))
        # What is not trained but follows a trained token in the slice is not known yet
        hidden = ~scored & ((scored & (slices == current)).cumsum(1) > 0)
        round_ = slice_round(slices, current, drawn | hidden, scored)
        count = round_.scored.sum(1, keepdim=True).clamp(min=1)
        return [Round(round_.masked, round_.scored, (scored.sum(1, keepdim=True) / count).expand(scored.shape))]
