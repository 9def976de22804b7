import torch

from .common import TokenScores, top_quota


def entropy(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
    """The `quota` tokens whose distribution has the lowest entropy (Dream's `entropy`, arXiv 2508.15487)."""
    return top_quota(scores.ranked(-scores.entropy), masked, quota)
