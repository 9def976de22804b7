import torch

from .common import TokenScores, top_quota


def margin(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
    """The `quota` tokens with the largest gap between the two best probabilities (Dream's `topk_margin`)."""
    return top_quota(scores.ranked(scores.margin), masked, quota)
