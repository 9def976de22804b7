"""ESPO: one ratio per response, of an ELBO for which a mask and its complement are scored together."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .corruptions import counted_masks, draw_counted
from .option_checks import check_counts
from .ratios import clipped_surrogate, kl_estimate, ratio_metrics, sequence_sums


def espo_pair(mask: torch.Tensor, trained: torch.Tensor, ratio: torch.Tensor, share: float = 1.0) -> list[Round]:
    """A mask `(B, R)` and its complement in `trained`: weighted with `1 / ratio` and `1 / (L / (L + 1) - ratio)`, of
    which half of `share`, their log-probabilities add up to an estimate of the ELBO (arXiv 2512.03759)."""
    other, length = trained & ~mask, trained.sum(1, keepdim=True)
    ratios = (mask, ratio), (other, length / (length + 1) - ratio)
    weights = [torch.where(half, share / 2 / one, 0.0) for half, one in ratios]
    return [Round(half, half, weight) for half, weight in zip((mask, other), weights, strict=True)]


def espo_loss(elbo, old, ref, advantages, lengths, epsilon_low, epsilon_high, beta=0.0):
    """Mean over responses, with the ratio `exp((E - E_old) / L)`; the first five `(B,)`, `ref` with `beta` only."""
    kl = kl_estimate(elbo - ref, "k2") / lengths if beta else 0.0
    return (beta * kl - clipped_surrogate((elbo - old) / lengths, advantages, epsilon_low, epsilon_high)).mean()


@dataclass
class ESPOObjective(Objective):
    """`num_samples` pairs of a mask and its complement. How many tokens the masks hide, 0 to all, is spread evenly."""

    partial: ClassVar[bool] = False

    num_samples: int = 1
    num_views: int = 1

    def __post_init__(self):
        check_counts(self, "num_samples", "num_views")

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        return draw_counted(rows, random, self.num_samples, self.num_views)

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        states, share = rows.trained.sum(1, keepdim=True) + 1, 1 / self.num_samples
        masks = counted_masks(rows, view, self.num_samples, least=0)
        return [half for mask, count in masks for half in espo_pair(mask, rows.trained, count / states, share)]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, old, ref = sequence_sums(inputs)
        lengths, clip = inputs.lengths.clamp(min=1), (inputs.epsilon_low, inputs.epsilon_high)
        loss = espo_loss(new, old, ref, inputs.advantages, lengths, *clip, inputs.beta)
        return LossOutputs(loss, ratio_metrics((new - old) / lengths, *clip))
