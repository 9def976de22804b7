import torch

from .common import TokenScores, top_quota


def sequential(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
    """Left to right: the leftmost `quota` masked tokens."""
    return top_quota(masked.float(), masked, quota)
