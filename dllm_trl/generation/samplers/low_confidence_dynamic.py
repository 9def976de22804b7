from dataclasses import dataclass, field

import torch

from .common import TokenScores, top_quota


@dataclass
class LowConfidenceDynamic:
    """
    Every token above the threshold if they are at least `quota`, else the `quota` most probable ones (Fast-dLLM, arXiv
    2505.22618; the decoding of SDAR and TraDo).
    """

    confidence_threshold: float = field(
        default=0.9,
        metadata={
            "help": "Probability in [0, 1] above which 'low_confidence_dynamic' commits.",
            "elsewhere": ("threshold", "conf_threshold", "dynamic_threshold", "unmask_threshold"),
        },
    )

    def __post_init__(self):
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(
                f"`confidence_threshold` is a probability in [0, 1], but is {self.confidence_threshold!r}."
            )

    def __call__(self, scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        confident = masked & (scores.confidence > self.confidence_threshold)
        enough = confident.sum(-1, keepdim=True) >= quota[:, None]
        return torch.where(enough, confident, top_quota(scores.confidence, masked, quota))
