from dataclasses import dataclass, field

import torch

from .common import TokenScores, top_quota


@dataclass
class EntropyBound:
    """
    The largest set of lowest-entropy tokens whose summed entropy without the largest one stays within `entropy_bound`
    nats: an upper bound on what the tokens say about each other (arXiv 2505.24857, eq. 5). At least `quota` tokens, so
    that the block is done within `denoising_steps`.
    """

    entropy_bound: float = field(
        default=0.1,
        metadata={"help": "Bound in nats, at least 0, of 'entropy_bound'.", "elsewhere": ("eb_threshold",)},
    )

    def __post_init__(self):
        if not self.entropy_bound >= 0:
            raise ValueError(f"`entropy_bound` must be at least 0 nats, but is {self.entropy_bound!r}.")

    def __call__(self, scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        ascending, order = scores.entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
        within = torch.cumsum(ascending, -1) - ascending <= self.entropy_bound  # inf - inf = nan compares False
        within = torch.zeros_like(masked).scatter_(-1, order, within) & masked
        enough = within.sum(-1, keepdim=True) >= quota[:, None]
        return torch.where(enough, within, top_quota(-scores.entropy, masked, quota))
