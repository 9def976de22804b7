"""BGPO: each corruption has a loss of its own, a bound of that of all, so that memory does not grow with them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .corruptions import counted_masks, draw_counted
from .option_checks import check_counts
from .ratios import ratio_metrics


def bgpo_loss(elbos, old, advantages, epsilon_low=0.2, epsilon_high=0.2, dual_clip=3.0):
    """
    Mean over responses and corruptions (arXiv 2510.11683): PPO's loss of `elbos` and `old` `(B, K)`, likelihoods per
    token, with the ratio `1 + l - l_old` where the advantages `(B,)` are positive, `exp(l - l_old)` elsewhere.
    """
    advantages, difference = advantages.unsqueeze(1), elbos - old
    ratio = torch.where(advantages > 0, 1 + difference, difference.clamp(max=10.0).exp())
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss).mean()


@dataclass
class BGPOObjective(Objective):
    """`num_samples` corruptions of exactly so many tokens as LLaDA's likelihood masks, spread evenly over 1 to all.
    Where the advantage is negative, a loss is at most that of the ratio `dual_clip`."""

    has_kl: ClassVar[bool] = False

    num_samples: int = 4
    dual_clip: float = 3.0
    num_views: int = 1

    def __post_init__(self):
        check_counts(self, "num_samples", "num_views")
        if not self.dual_clip > 1:
            raise ValueError(f"`dual_clip` must be above 1, but is {self.dual_clip!r}. The authors' value is 3.0.")

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        return draw_counted(rows, random, self.num_samples, self.num_views)

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        masks = counted_masks(rows, view, self.num_samples, least=1)
        return [Round(mask, mask, mask / count) for mask, count in masks]

    def reduce(self, token_logps: torch.Tensor, rounds: list[Round]) -> torch.Tensor:
        """The ELBO per token `(B, K)` of each corruption: |o| / masked times its sum, over |o|."""
        return (token_logps * torch.stack([one.loss_weight for one in rounds])).sum(2).T

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, clip = inputs.logps, (inputs.epsilon_low, inputs.epsilon_high)
        old = new.detach() if inputs.old_logps is None else inputs.old_logps
        return LossOutputs(
            bgpo_loss(new, old, inputs.advantages, *clip, self.dual_clip), ratio_metrics(new - old, *clip)
        )
