"""The likelihood of a response between two bounds, both from the same corruptions."""

import math

import torch


def spg_bounds(logps: torch.Tensor, masks: torch.Tensor, completion: torch.Tensor, eubo_beta: float = 1.5):
    """
    ELBO and EUBO `(B,)` per token (arXiv 2510.09541) of log-probabilities and masks `(K, B, R)`. In the latter those
    tokens count that at least one of the `K` corruptions masks.
    """
    masks = masks.bool() & completion.bool()
    counts = masks.sum(2).clamp(min=1)  # (K, B)
    level = counts / completion.sum(1).clamp(min=1)
    seen = masks.any(0)
    powers = torch.where(masks, eubo_beta * logps - level.log().unsqueeze(2), -torch.inf).masked_fill(~seen, 0.0)
    means = (powers.logsumexp(0) - math.log(len(masks))) * seen
    return ((logps * masks).sum(2) / counts).mean(0), means.sum(1) / seen.sum(1).clamp(min=1) / eubo_beta


def spg_sequence_logp(logps, masks, completion, positive, mode="mix", eubo_beta=1.5, mix_weight=0.5):
    """What stands for the log-likelihood per token `(B,)`: the ELBO where `positive` `(B,)`, else what `mode` says."""
    elbo, eubo = spg_bounds(logps, masks, completion, eubo_beta)
    mix = mix_weight * eubo + (1 - mix_weight) * elbo
    return torch.where(positive, elbo, {"mix": mix, "eubo": eubo, "elbo": elbo, "zero": torch.zeros_like(elbo)}[mode])
