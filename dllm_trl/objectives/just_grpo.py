"""JustGRPO (arXiv 2601.15165): a rollout from left to right, whose tokens are scored given those to their left."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Outcome
from .leftmost import leftmost_rounds
from .option_checks import check_counts
from .ratios import clipped_surrogate, kl_estimate, ratio_metrics


def num_informative(advantages: torch.Tensor, processes: int = 1) -> torch.Tensor:
    """Responses that have something to teach, `A != 0`, per process, and never quite 0."""
    return (advantages != 0).sum() / processes + 1e-5


def just_grpo_loss(log_ratios, advantages, scored, epsilon_low, epsilon_high, size):
    """Sum over the tokens of `scored` `(B, R)`, over how many they can be; `advantages` are `(B, 1)` or `(B, R)`."""
    return -(clipped_surrogate(log_ratios, advantages, epsilon_low, epsilon_high) * scored).sum() / size


@dataclass
class JustGRPOObjective(Objective):
    """Wants rollouts from left to right, a token per step, and scores them as they were decoded. `max_length` is what
    the loss of each response is divided by."""

    replays_rollout: ClassVar[bool] = True
    partial: ClassVar[bool] = False
    token_advantages: ClassVar[bool] = True
    width: ClassVar[int] = 1

    max_length: int = 256

    def __post_init__(self):
        check_counts(self, "max_length", "width")

    def decoding(self, block_length: int) -> dict[str, Any]:
        steps = max(block_length // self.width, 1)
        return {"remasking_strategy": "sequential", "denoising_schedule": "even", "denoising_steps": steps}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        blocks = rows.blocks if rows.grid.attention == "block" else None
        return leftmost_rounds(rows.canvas_mask.bool(), rows.trained, blocks=blocks, width=self.width)

    def advantages(self, values: torch.Tensor, outcome: Outcome) -> torch.Tensor:
        """A mean over all responses becomes one over the informative ones, however they are split."""
        return values * len(values) / num_informative(values * outcome.counted) if values.dim() == 1 else values

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, old, worth = inputs.logps, inputs.old_logps, inputs.advantages
        ratios, clip = new - (new.detach() if old is None else old), (inputs.epsilon_low, inputs.epsilon_high)
        size = self.max_length * len(new)
        loss = just_grpo_loss(ratios, worth.view(len(new), -1), inputs.scored, *clip, size)
        if inputs.beta:
            loss = loss + inputs.beta * (kl_estimate(new - inputs.ref_logps) * inputs.scored).sum() / size
        return LossOutputs(loss, ratio_metrics(ratios[inputs.scored], *clip))
