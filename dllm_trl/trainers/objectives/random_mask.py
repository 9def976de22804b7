"""Random masking (LLaDA, MDLM, Dream): a sequence's trained tokens are masked with one probability each draws anew."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...types import Round
from .block import mask_probability
from .cart import cart_weights


WEIGHTINGS = ("elbo", "cart", "mean", "none")


@dataclass
class RandomMaskObjective:
    r"""
    Masks each trained token of a sequence with the sequence's probability p and scores it.

    Args:
        weighting (`str`, *optional*, defaults to `"elbo"`):
            `"elbo"`: 1/p, the likelihood bound of LLaDA and of MDLM's linear schedule. `"cart"`: by the distance to
            what is visible ([`cart_weights`], Dream), the prompt included. `"mean"`: each sequence's loss is that of
            its masked tokens on average. `"none"`: 1.
        eps (`float`, *optional*, defaults to `1e-3`):
            Smallest mask probability.
        largest (`float`, *optional*, defaults to `1.0`):
            Largest mask probability.
        cart_p (`float`, *optional*, defaults to `0.3`):
            Parameter of the geometric distribution of `"cart"`.
    """

    attentions: ClassVar[tuple[str, ...]] = ("full",)
    loss_norm: ClassVar[str] = "sequence"

    weighting: str = "elbo"
    eps: float = 1e-3
    largest: float = 1.0
    cart_p: float = 0.3

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]:
        scored = batch["scored"]
        probability = torch.ones(scored.shape, device=scored.device)
        probability[scored.any(1)] = mask_probability(batch["levels"], self.eps, self.largest).float().unsqueeze(1)
        drawn = torch.zeros_like(scored)
        drawn[scored] = batch["uniform"] < probability[scored]
        return [Round(masked=drawn, scored=drawn, weight=self._weight(batch, drawn, probability))]

    def _weight(self, batch, drawn: torch.Tensor, probability: torch.Tensor) -> torch.Tensor | None:
        if self.weighting == "elbo":
            return 1 / probability
        if self.weighting == "mean":
            return (batch["scored"].sum(1, keepdim=True) / drawn.sum(1, keepdim=True).clamp(min=1)).expand(drawn.shape)
        if self.weighting == "cart":
            start, prompt = batch["prompt_mask"].sum(1, keepdim=True), batch["prompt_ids"].size(1)
            columns = torch.arange(prompt + drawn.size(1), device=drawn.device)
            place = start + columns[: drawn.size(1)]  # of each response token among those that exist
            known = (columns < start).scatter(1, place, batch["canvas_mask"].bool() & ~drawn)
            return cart_weights(known, self.cart_p).gather(1, place)
        return None
