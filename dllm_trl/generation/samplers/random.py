import torch

from .common import TokenScores, top_quota


def random(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
    """`quota` masked tokens drawn uniformly."""
    return top_quota(scores.uniform, masked, quota)
