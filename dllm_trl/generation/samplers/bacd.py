from dataclasses import dataclass, field

import torch

from .common import TokenScores, top_quota


@dataclass
class BoundedAdaptive:
    """
    Every token at or above a threshold that follows the block (TDAR, arXiv 2602.09555): the largest confidence at its
    first step, from then on the mean confidence of the tokens it has committed, between two bounds. At least `quota`.
    """

    threshold_lower: float = field(
        default=0.6, metadata={"help": "Probability that the threshold of 'bacd' does not fall below."}
    )
    threshold_upper: float = field(
        default=0.9, metadata={"help": "Probability that the threshold of 'bacd' does not rise above."}
    )

    def __post_init__(self):
        if not 0 <= self.threshold_lower <= self.threshold_upper <= 1:
            raise ValueError(
                "`threshold_lower` and `threshold_upper` are probabilities in [0, 1], the first not above the second, "
                f"but are {self.threshold_lower!r} and {self.threshold_upper!r}."
            )

    def threshold(self, scores: TokenScores, masked: torch.Tensor) -> torch.Tensor:
        """Of each block, `(B, 1)`."""
        largest = scores.confidence.masked_fill(~masked, 0).amax(-1, keepdim=True)
        mean = scores.committed.nanmean(-1, keepdim=True)
        return mean.where(~mean.isnan(), largest).clamp(self.threshold_lower, self.threshold_upper)

    def __call__(self, scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        confident = masked & (scores.confidence >= self.threshold(scores, masked))
        enough = confident.sum(-1, keepdim=True) >= quota[:, None]
        return torch.where(enough, confident, top_quota(scores.confidence, masked, quota))
