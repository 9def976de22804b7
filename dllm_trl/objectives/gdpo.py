"""GDPO (arXiv 2510.08554): a response's ELBO by quadrature over the noise level, and one ratio per response of it."""

from dataclasses import dataclass

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Random
from .corruptions import mask_counted
from .option_checks import check_choices, check_counts
from .quadrature import gauss_legendre
from .ratios import clipped_surrogate, kl_estimate, ratio_metrics, sequence_sums


def gdpo_mask(uniform: torch.Tensor, trained: torch.Tensor, point: float, min_count: int = 1) -> torch.Tensor:
    """Masks `floor(point |o|)` tokens of `trained` `(B, R)`, at least `min_count`: those of the smallest `uniform`."""
    return mask_counted(trained, (point * trained.sum(1, keepdim=True).double()).floor().clamp(min=min_count), uniform)


def gdpo_round(mask: torch.Tensor, lengths: torch.Tensor, point: float, share: float, weight: str) -> Round:
    """Its tokens weigh `share` over t (`weight="t"`) or, unbiased, over the share of tokens that it masks."""
    ratio = torch.full_like(lengths, point, dtype=torch.float) if weight == "t" else mask.sum(1).clamp(min=1) / lengths
    return Round(mask, mask, (share / ratio).unsqueeze(1).expand(mask.shape))


def gdpo_loss(elbo, old, ref, advantages, lengths, epsilon_low, epsilon_high, beta=0.0, kl_norm="length"):
    """Mean over responses, with the ratio `exp((E - E_old) / |o|)`. The first five are `(B,)`."""
    kl = kl_estimate((elbo - ref) / (lengths if kl_norm == "length" else 1)) if beta else 0.0
    return (beta * kl - clipped_surrogate((elbo - old) / lengths, advantages, epsilon_low, epsilon_high)).mean()


@dataclass
class GDPOObjective(Objective):
    """Masks exactly `floor(t |o|)` tokens at random at each of `n` noise levels t (Gauss-Legendre), `num_samples`
    times. `weight`: see [`gdpo_round`]. `kl_norm`: the KL term of the ELBO per token (`"length"`), or `"none"`."""

    n: int = 3
    num_samples: int = 1
    weight: str = "count"
    kl_norm: str = "length"

    def __post_init__(self):
        check_counts(self, "n", "num_samples")
        check_choices(self, weight=("count", "t"), kl_norm=("length", "none"))

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        return {f"mask{i}": random.uniform(rows.trained) for i in range(self.n * self.num_samples)}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        levels = [level for level in gauss_legendre(self.n) for _ in range(self.num_samples)]
        masks = [gdpo_mask(rows.draws[f"mask{i}"], rows.trained, point) for i, (point, _) in enumerate(levels)]
        each = [(mask, point, share / self.num_samples) for mask, (point, share) in zip(masks, levels, strict=True)]
        return [gdpo_round(mask, rows.trained.sum(1), point, share, self.weight) for mask, point, share in each]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, old, ref = sequence_sums(inputs)
        lengths, clip = inputs.lengths.clamp(min=1), (inputs.epsilon_low, inputs.epsilon_high)
        loss = gdpo_loss(new, old, ref, inputs.advantages, lengths, *clip, inputs.beta, self.kl_norm)
        return LossOutputs(loss, ratio_metrics((new - old) / lengths, *clip))
