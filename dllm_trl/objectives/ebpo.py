"""EBPO (LLaDA2.1, arXiv 2602.08676): an ELBO block by block, and one ratio per response that is not per token."""

from dataclasses import dataclass

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .block_noise import block_sums, ebpo_counts, ebpo_mask
from .option_checks import check_choices, check_counts
from .ratios import clipped_surrogate, kl_estimate, ratio_metrics, sequence_sums


def ebpo_round(mask: torch.Tensor, trained: torch.Tensor, blocks: torch.Tensor, share: float) -> Round:
    """Its tokens weigh `share` times the size of their block over how many of it are masked, to estimate the ELBO."""
    weights = share * block_sums(trained, blocks) / block_sums(mask, blocks).clamp(min=1)
    return Round(mask, mask, weights.gather(1, blocks))


def ebpo_loss(elbo, old, ref, advantages, valid, num_rows, epsilon_low, epsilon_high, beta=0.0, kl="k2"):
    """Sum over the `valid` of `num_rows` responses, with the ratio `exp(E - E_old)`. The first five are `(B,)`."""
    penalty = beta * kl_estimate(elbo - ref, kl) if beta else 0.0
    losses = penalty - clipped_surrogate(elbo - old, advantages, epsilon_low, epsilon_high)
    return (losses * valid).sum() / num_rows


@dataclass
class EBPOObjective(Objective):
    """`num_samples` corruptions of every block of a response at a noise level of its own. `kl`: k1, k2 or k3."""

    num_samples: int = 16
    kl: str = "k2"

    def __post_init__(self):
        check_counts(self, "num_samples")
        check_choices(self, kl=("k1", "k2", "k3"))

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        some, samples = rows.trained.any(1, keepdim=True), range(self.num_samples)
        starts = {f"start{i}": random.uniform(some) for i in samples}
        return starts | {f"mask{i}": random.uniform(rows.trained) for i in samples}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        draws, trained, blocks = rows.draws, rows.trained, rows.blocks - rows.blocks[:, :1]
        counts = [ebpo_counts(block_sums(trained, blocks), draws[f"start{i}"]) for i in range(self.num_samples)]
        masks = [ebpo_mask(count, trained, blocks, draws[f"mask{i}"]) for i, count in enumerate(counts)]
        return [ebpo_round(mask, trained, blocks, 1 / self.num_samples) for mask in masks]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, old, ref = sequence_sums(inputs)
        clip, valid = (inputs.epsilon_low, inputs.epsilon_high), inputs.lengths > 0
        loss = ebpo_loss(new, old, ref, inputs.advantages, valid, len(valid), *clip, inputs.beta, self.kl)
        return LossOutputs(loss, ratio_metrics(new - old, *clip))
