"""Block diffusion SFT (BD3LM, SDAR): every block is masked at its own noise level; a token's loss is divided by it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...types import Round


def mask_probability(level: torch.Tensor, eps: float = 1e-3, largest: float = 1.0) -> torch.Tensor:
    """Probability that a token of noise level `level` in [0, 1) is masked: from `eps`, never 0, to `largest`."""
    return (largest - eps) * level + eps


@dataclass
class BlockObjective:
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

    def _units(self, batch: dict[str, torch.Tensor], block_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, R)` number of what shares a noise level, and of the block, both counted through the batch."""
        columns = torch.arange(batch["canvas_ids"].size(1), device=batch["canvas_ids"].device)
        block = (batch["prompt_mask"].sum(1, keepdim=True) + columns) // block_length
        rows = torch.arange(len(block), device=block.device).unsqueeze(1).expand_as(block)
        block = rows * (block.max() + 1) + block
        return (block if self.noise_per == "block" else rows), block

    def num_levels(self, batch: dict[str, torch.Tensor], block_length: int) -> torch.Tensor:
        """Noise levels that each row needs, `(B,)`."""
        unit, _ = self._units(batch, block_length)
        rows = torch.arange(len(unit), device=unit.device).unsqueeze(1).expand_as(unit)
        used = torch.unique(torch.stack([rows, unit])[:, batch["scored"]], dim=1)
        return torch.bincount(used[0], minlength=len(unit))

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int) -> list[Round]:
        """
        Args:
            batch (`dict[str, torch.Tensor]`):
                Rows as [`unpack_rows`] gives them, with `levels`, one for each of `num_levels`, and `uniform`, one for
                each token of `scored`, both uniform in [0, 1) and in the order of the rows.
            block_length (`int`):
                Tokens denoised together.
        """
        scored = batch["scored"]
        unit, block = self._units(batch, block_length)
        _, index = torch.unique(unit[scored], return_inverse=True)
        probability = mask_probability(batch["levels"], self.eps, self.largest)[index]

        drawn = torch.zeros_like(scored)
        drawn[scored] = batch["uniform"] < probability
        weight = torch.zeros(scored.shape, device=scored.device)
        weight[scored] = 1 / probability

        columns = torch.arange(scored.size(1), device=scored.device).expand_as(block)
        first = torch.full((int(block.max()) + 1,), scored.size(1), device=scored.device)
        first.scatter_reduce_(0, block[scored], columns[scored], "amin")
        unknown = batch["canvas_mask"].bool() & ~scored & (columns > first[block])
        return [Round(masked=drawn | unknown, scored=drawn, weight=weight)]
