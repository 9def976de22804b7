"""AGRPO (arXiv 2510.04019): sampled denoising steps stand for the whole trace, weighed by how likely they were."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .option_checks import check_choices, check_counts
from .ratios import clipped_surrogate, kl_estimate, ratio_metrics
from .steps import drawn_rounds, renumbered, sample_steps


def agrpo_loss(new, old, ref, advantages, rounds, epsilon_low, epsilon_high, beta=0.0):
    """Mean over draws and responses of the sum over tokens; a KL term is weighed by the ratio, as they have it."""
    loss = -clipped_surrogate(new - old, advantages, epsilon_low, epsilon_high)
    loss = loss + (beta * (new - old).exp() * kl_estimate(new - ref) if beta else 0)
    return (sum(r.scored * r.loss_weight for r in rounds) * loss).sum() / (len(rounds) * len(loss))


@dataclass
class AGRPOObjective(Objective):
    """Draws `num_samples` steps of a response, one in each of as many strata of [0, 1), with an `importance` that is
    `"uniform"` or in proportion to their `"entropy"`, and scores what they committed as the rollout saw it."""

    step_map: ClassVar[str] = "required"
    token_advantages: ClassVar[bool] = True

    num_views: int = 1
    num_samples: int = 24
    importance: str = "uniform"

    def __post_init__(self):
        check_counts(self, "num_views", "num_samples")
        check_choices(self, importance=("uniform", "entropy"))
        self.reads_entropies = self.importance == "entropy"

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        (turns, values), entropies = renumbered(rows.step_map, rows.trained), rows.entropies
        strata, draws = torch.arange(self.num_samples, device=values.device).expand(len(rows), -1), {}
        for view in range(self.num_views):
            numbers = (strata + random.uniform(strata >= 0).double()) / self.num_samples
            turn, weights = sample_steps(turns, rows.trained, numbers, entropies if self.reads_entropies else None)
            steps = values.gather(1, turn.clamp(min=0)).where(turn >= 0, -1)
            draws |= {f"steps{view}": steps, f"weights{view}": weights}
        return draws

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return drawn_rounds(rows.step_map, rows.trained, rows.draws[f"steps{view}"], rows.draws[f"weights{view}"])

    def reduce(self, token_logps: torch.Tensor, rounds: list[Round]) -> torch.Tensor:
        return token_logps.sum(0)  # each token is scored once: the weights are the loss's

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, clip = inputs.logps, (inputs.epsilon_low, inputs.epsilon_high)
        old = new.detach() if inputs.old_logps is None else inputs.old_logps
        rows = (new, old, inputs.ref_logps, inputs.advantages.view(len(new), -1), inputs.rounds)
        return LossOutputs(agrpo_loss(*rows, *clip, inputs.beta), ratio_metrics((new - old)[inputs.scored], *clip))
