"""wd1: likelihoods weighted by how good a response is among all of a rollout, without a ratio to an old policy."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import LossInputs, LossOutputs, Outcome
from .diffu_grpo import DiffuGRPOObjective


def wd1_weights(advantages: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """`softmax(A) - softmax(-A)` `(N,)` over the rows that are `counted`, 0 for the others (arXiv 2507.08838)."""
    good, bad = (a.masked_fill(~counted, -torch.inf).softmax(0) for a in (advantages, -advantages))
    return torch.where(counted, good - bad, 0.0)


def wd1_loss(weights: torch.Tensor, token_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`-sum_b w_b sum_j lp_bj` over the tokens of `mask` `(B, R)`."""
    return -(weights * (token_logps * mask).sum(1)).sum()


@dataclass
class WD1Objective(DiffuGRPOObjective):
    """
    The rounds of d1: one pass with the whole response masked, and some of the prompt. The softmax runs over the whole
    rollout, the responses of all processes, so that no number depends on how it is split.
    """

    has_ratio: ClassVar[bool] = False
    has_kl: ClassVar[bool] = False

    def advantages(self, values: torch.Tensor, outcome: Outcome) -> torch.Tensor:
        # Times their number: the mean over rows that the trainer makes of it is a sum again
        return wd1_weights(values, outcome.counted & ~outcome.total.isnan()) * len(values)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(wd1_loss(inputs.advantages, inputs.logps, inputs.scored) / len(inputs.rows))
