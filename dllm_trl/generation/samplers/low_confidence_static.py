import torch

from .common import TokenScores, top_quota


def low_confidence_static(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
    """The `quota` most probable tokens; those of low confidence stay masked (LLaDA, arXiv 2502.09992)."""
    return top_quota(scores.ranked(scores.confidence), masked, quota)
