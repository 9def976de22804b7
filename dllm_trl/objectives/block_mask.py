"""Block diffusion SFT (BD3LM, SDAR): every block is masked at its own noise level; a token's loss is divided by it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import Objective, Random


def mask_probability(level: torch.Tensor, eps: float = 1e-3, largest: float = 1.0) -> torch.Tensor:
    """Probability that a token of noise level `level` in [0, 1) is masked: from `eps`, never 0, to `largest`."""
    return (largest - eps) * level + eps


@dataclass
class BlockObjective(Objective):
    r"""
    Masks each token of a block with the block's probability p and weights its loss by 1/p.

    A token that is not trained is never masked by chance. Where one follows a trained token inside a block (the next
    turn of a conversation after the end of an answer) it is always masked: at that point of decoding nobody knows it.

    Args:
        noise_per (`str`, *optional*, defaults to `"block"`):
            `"block"`: a noise level per block (BD3LM). `"sequence"`: one per sequence (SDAR's published training).
        eps (`float`, *optional*, defaults to `1e-3`):
            Smallest mask probability.
        largest (`float`, *optional*, defaults to `1.0`):
            Largest mask probability.
    """

    attentions: ClassVar[tuple[str, ...]] = ("block",)

    noise_per: str = "block"
    eps: float = 1e-3
    largest: float = 1.0

    def _levels(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """For each trained token, in order, which of its row's noise levels is its own; and their number `(B,)`."""
        units = rows.blocks if self.noise_per == "block" else torch.zeros_like(rows.canvas_ids)
        row = torch.arange(len(rows), device=units.device).unsqueeze(1).expand_as(units)
        pairs, index = torch.unique(torch.stack([row, units])[:, rows.trained], dim=1, return_inverse=True)
        counts = torch.bincount(pairs[0], minlength=len(rows))
        first = counts.cumsum(0) - counts
        return index - first[row[rows.trained]], counts

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        counts = self._levels(rows)[1].unsqueeze(1)
        where = torch.arange(int(counts.max()), device=counts.device) < counts
        return {"level": random.levels(where), "uniform": random.uniform(rows.trained)}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        trained, blocks = rows.trained, rows.blocks
        row = torch.arange(len(rows), device=blocks.device).unsqueeze(1).expand_as(blocks)
        level = rows.draws["level"][row[trained], self._levels(rows)[0]]
        probability = mask_probability(level, self.eps, self.largest)
        loss_weight = torch.zeros(trained.shape, device=trained.device).masked_scatter(trained, 1 / probability)
        drawn = torch.zeros_like(trained).masked_scatter(trained, rows.draws["uniform"][trained] < probability)

        columns = torch.arange(trained.size(1), device=trained.device).expand_as(blocks)
        first = torch.full((len(rows), int(blocks.max()) + 1), trained.size(1), device=trained.device)
        first.scatter_reduce_(1, blocks, columns.masked_fill(~trained, trained.size(1)), "amin")
        unknown = rows.canvas_mask.bool() & ~trained & (columns > first.gather(1, blocks))
        return [Round(masked=drawn | unknown, scored=drawn, loss_weight=loss_weight)]
