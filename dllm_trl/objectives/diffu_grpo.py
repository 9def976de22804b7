"""diffu-GRPO (d1): one pass with the whole response masked, behind a prompt of which some tokens are masked too."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import Objective, Random
from .corruptions import draw_prompt
from .option_checks import check_counts, check_shares


@dataclass
class DiffuGRPOObjective(Objective):
    r"""
    Scores every trained token with the whole response masked (block attention: with the token's block masked, behind
    clean ones). Each prompt token is masked with a probability, anew for each update (arXiv 2504.12216, section 3.2).

    Args:
        prompt_mask_prob (`float`, *optional*, defaults to `0.15`):
            Probability that a prompt token is masked.
        num_views (`int`, *optional*, defaults to `1`):
            Updates on a rollout, each with a prompt mask of its own.
    """

    partial: ClassVar[bool] = False

    prompt_mask_prob: float = 0.15
    num_views: int = 1

    def __post_init__(self):
        check_counts(self, "num_views")
        check_shares(self, "prompt_mask_prob")

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        drawn = [draw_prompt(rows, random) < self.prompt_mask_prob for _ in range(self.num_views)]
        return {"prompt": torch.stack(drawn, dim=1) & rows.prompt_mask.bool().unsqueeze(1)}  # (B, V, P)

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return [Round(rows.canvas_mask.bool(), rows.trained, prompt_masked=rows.draws["prompt"][:, view])]
