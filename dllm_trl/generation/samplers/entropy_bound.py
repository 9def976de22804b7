import torch

from .common import TokenScores, top_quota


def entropy_bound(
    scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, *, entropy_bound: float, **kwargs
) -> torch.Tensor:
    """
    The largest set of lowest-entropy tokens whose summed entropy without the largest one stays within `entropy_bound`
    nats: an upper bound on what the tokens say about each other (arXiv 2505.24857, eq. 5). At least `quota` tokens, so
    that the block is done within `denoising_steps`.
    """
    ascending, order = scores.entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
    within = torch.cumsum(ascending, -1) - ascending <= entropy_bound  # inf - inf = nan compares False
    within = torch.zeros_like(masked).scatter_(-1, order, within) & masked
    enough = within.sum(-1, keepdim=True) >= quota[:, None]
    return torch.where(enough, within, top_quota(-scores.entropy, masked, quota))
