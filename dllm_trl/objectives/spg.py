"""SPG: a lower bound of the likelihood for good responses, a mix of a lower and an upper one for the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .corruptions import block_random_rounds, draw_block_random
from .option_checks import check_choices, check_counts
from .sandwich import spg_sequence_logp


def spg_loss(sequence_logps, advantages, lengths, total):
    """`-sum A lp |o| / total`, all but `total` `(B,)`."""
    return -(advantages * sequence_logps * lengths).sum() / total


@dataclass
class SPGObjective(Objective):
    """Scores all tokens that `num_samples` corruptions mask: a block in part and all later ones, and of what comes
    before, prompt included, `prompt_mask_prob`. `mode` ("mix", "eubo", "elbo", "zero"): the bound where A <= 0."""

    has_ratio: ClassVar[bool] = False
    has_kl: ClassVar[bool] = False

    num_samples: int = 2
    mode: str = "mix"
    eubo_beta: float = 1.5
    mix_weight: float = 0.5
    prompt_mask_prob: float = 0.15
    num_views: int = 1

    def __post_init__(self):
        check_counts(self, "num_samples", "num_views")
        check_choices(self, mode=("mix", "eubo", "elbo", "zero"))

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        views = [draw_block_random(rows, random, self.num_samples, f"view{v}_") for v in range(self.num_views)]
        return {name: drawn for view in views for name, drawn in view.items()}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return block_random_rounds(rows, self.num_samples, f"view{view}_", self.prompt_mask_prob)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        masks, options = torch.stack([r.scored for r in inputs.rounds]), (self.mode, self.eubo_beta, self.mix_weight)
        bound = spg_sequence_logp(inputs.token_logps, masks, inputs.rows.trained, inputs.advantages > 0, *options)
        loss = spg_loss(bound, inputs.advantages, inputs.lengths, inputs.num_trained)
        return LossOutputs(loss, {"bound": bound.mean()})
