import torch

from .common import TokenScores, top_quota


def low_confidence_dynamic(
    scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, *, confidence_threshold: float, **kwargs
) -> torch.Tensor:
    """
    Every token above the threshold if they are at least `quota`, else the `quota` most probable ones (Fast-dLLM, arXiv
    2505.22618; the decoding of SDAR and TraDo).
    """
    confident = masked & (scores.confidence > confidence_threshold)
    enough = confident.sum(-1, keepdim=True) >= quota[:, None]
    return torch.where(enough, confident, top_quota(scores.confidence, masked, quota))
