"""StableDRL (arXiv 2603.06743): SPG's bounds, and weights over a whole step in place of ratios to an old policy."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .corruptions import block_random_rounds, draw_block_random
from .elbo import elbo_rounds
from .option_checks import check_counts, check_positive
from .sandwich import spg_sequence_logp


@dataclass
class StableDRLObjective(Objective):
    """Each update, and the old policy that it is compared with, has masks of its own. `max_ratio`: the largest weight
    before they are normalised over the step; `eubo_beta` and `mix_weight` are of the bound where A <= 0."""

    needs_old: ClassVar[bool] = True
    has_kl: ClassVar[bool] = False

    num_samples: int = 2
    eubo_beta: float = 1.5
    mix_weight: float = 0.5
    max_ratio: float = 5.0
    num_views: int = 1

    def __post_init__(self):
        check_counts(self, "num_samples", "num_views")
        check_positive(self, "eubo_beta", "max_ratio")

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        names = [f"{who}{view}_" for view in range(self.num_views) for who in ("new", "old")]
        drawn = [draw_block_random(rows, random, self.num_samples, name) for name in names]
        return {name: numbers for one in drawn for name, numbers in one.items()}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return elbo_rounds(block_random_rounds(rows, self.num_samples, f"new{view}_"))

    def old_rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return elbo_rounds(block_random_rounds(rows, self.num_samples, f"old{view}_"))

    def log_weights(self, inputs: LossInputs) -> torch.Tensor:
        difference = inputs.logps.detach().sum(1) - inputs.old_logps.sum(1)
        return difference.clamp(max=math.log(self.max_ratio))  # on one side, whatever the advantage

    def loss(self, inputs: LossInputs) -> LossOutputs:
        masks, options = torch.stack([r.scored for r in inputs.rounds]), ("mix", self.eubo_beta, self.mix_weight)
        bound = spg_sequence_logp(inputs.token_logps, masks, inputs.rows.trained, inputs.advantages > 0, *options)
        weights = inputs.batch_weights
        if weights is None:  # an evaluation has no steps
            weights = self.log_weights(inputs).softmax(0) * len(bound)
        loss = -(weights * inputs.advantages * bound).mean()
        return LossOutputs(loss, {"bound": bound.mean(), "weight/largest": weights.max()})
