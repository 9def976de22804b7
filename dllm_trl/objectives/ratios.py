"""What objectives with a ratio to the old policy share, be it of tokens or of sequences."""

import math

import torch

from .base import LossInputs


# Its exponential is still a number in single precision and in bfloat16; a ratio beyond it has no gradient
MAX_LOG_RATIO = 60.0


def clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> torch.Tensor:
    """
    `min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)` with `rho = exp(log_ratio)`, clipped before the
    exponential, so that the side that is clipped cannot overflow, nor can its gradient. The other side ends at
    `exp(MAX_LOG_RATIO)`.
    """
    low = math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf
    high = math.log1p(epsilon_high)
    return (
        advantages * torch.where(advantages < 0, log_ratio.clamp(low, MAX_LOG_RATIO), log_ratio.clamp(max=high)).exp()
    )


def sequence_sums(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sums `(B,)` of the reduced log-probabilities over each response: of the current policy, the old one (while the
    weights are still its own, the same number without gradient), and the reference, if there is one."""
    new, ref = inputs.logps.sum(1), inputs.ref_logps
    old = new.detach() if inputs.old_logps is None else inputs.old_logps.sum(1)
    return new, old, None if ref is None else ref.sum(1)


def kl_estimate(difference: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """Schulman's k1, k2 or k3: the KL to a policy whose log-probabilities of the samples are `difference` lower."""
    if kind == "k1":
        return difference
    return difference.square() / 2 if kind == "k2" else (-difference).clamp(max=MAX_LOG_RATIO).exp() - 1 + difference


def ratio_metrics(log_ratio: torch.Tensor, epsilon_low: float, epsilon_high: float) -> dict[str, torch.Tensor]:
    """The mean of the ratios, and how many of them lie outside of the clipping range; of none, 1 and 0."""
    ratio = log_ratio.detach().exp()
    outside = (ratio < 1 - epsilon_low) | (ratio > 1 + epsilon_high)
    return {"ratio/mean": ratio.mean().nan_to_num(1.0), "ratio/outside": outside.float().mean().nan_to_num(0.0)}
