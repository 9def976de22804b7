"""From logits to tokens: counter-based randomness, filters, and the log-probabilities a trainer can recompute."""

import numpy as np
import torch


_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(*counters: int | np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit hash of integers (splitmix64 over them), elementwise with broadcasting."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = state + _MIX[0] + np.asarray(counter).astype(np.uint64)
            state = (state ^ (state >> np.uint64(30))) * _MIX[1]
            state = (state ^ (state >> np.uint64(27))) * _MIX[2]
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*counters: int | np.ndarray) -> np.ndarray:
    """Uniform float32 in [0, 1), a function of its counters alone: what a row draws depends on no other row."""
    return ((mix(*counters) >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    Samples one token per row of `logits` `(n, V)` by inverting the cumulative distribution at `uniform` `(n,)`. A
    token with logit -inf has no width there and is never drawn. Without any probability (NaN) it is the last one.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    # Strictly below the total, so that rounding cannot run past the last token that has any probability
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point[:, None], right=True).squeeze(-1).clamp(max=logits.size(-1) - 1)
