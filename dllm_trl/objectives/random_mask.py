"""Random masking (LLaDA, MDLM, Dream): a sequence's trained tokens are masked with one probability each draws anew."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import Objective, Random
from .block_mask import mask_probability
from .cart import cart_weights


WEIGHTINGS = ("elbo", "cart", "mean", "none")


@dataclass
class RandomMaskObjective(Objective):
    r"""
    Masks each trained token of a sequence with the sequence's probability p and scores it.

    Args:
        weighting (`str`, *optional*, defaults to `"elbo"`):
            `"elbo"`: 1/p, the likelihood bound of LLaDA and of MDLM's linear schedule. `"cart"`: by the distance to
            what is visible ([`cart_weights`], Dream), the prompt included. `"mean"`: each sequence's loss is that of
            its masked tokens on average. `"none"`: 1, and the loss is the mean over all masked tokens (dFactory).
        eps (`float`, *optional*, defaults to `1e-3`):
            Smallest mask probability.
        largest (`float`, *optional*, defaults to `1.0`):
            Largest mask probability.
        cart_p (`float`, *optional*, defaults to `0.3`):
            Parameter of the geometric distribution of `"cart"`.
    """

    attentions: ClassVar[tuple[str, ...]] = ("full",)

    weighting: str = "elbo"
    eps: float = 1e-3
    largest: float = 1.0
    cart_p: float = 0.3

    @property
    def loss_norm(self) -> str:
        return "masked" if self.weighting == "none" else "sequence"

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        return {"level": random.levels(rows.trained.any(1, keepdim=True)), "uniform": random.uniform(rows.trained)}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        trained = rows.trained
        probability = mask_probability(rows.draws["level"], self.eps, self.largest).expand(trained.shape)
        drawn = trained & (rows.draws["uniform"] < probability)
        return [Round(masked=drawn, scored=drawn, loss_weight=self._loss_weight(rows, drawn, probability))]

    def _loss_weight(self, rows: Rows, drawn: torch.Tensor, probability: torch.Tensor) -> torch.Tensor | None:
        if self.weighting == "elbo":
            return 1 / probability
        if self.weighting == "mean":
            return (rows.trained.sum(1, keepdim=True) / drawn.sum(1, keepdim=True).clamp(min=1)).expand(drawn.shape)
        if self.weighting == "cart":
            start, prompt = rows.prompt_mask.sum(1, keepdim=True), rows.prompt_ids.size(1)
            columns = torch.arange(prompt + drawn.size(1), device=drawn.device)
            place = start + columns[: drawn.size(1)]  # of each response token among those that exist
            known = (columns < start).scatter(1, place, rows.canvas_mask.bool() & ~drawn)
            return cart_weights(known, self.cart_p).gather(1, place)
        return None
