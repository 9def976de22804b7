"""Coupled GRPO (DiffuCoder): each random mask goes with its complement, so that a pair scores every token once."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import Objective, Random
from .corruptions import random_mask
from .option_checks import check_choices, check_counts, check_shares


def coupled_pair(drawn: torch.Tensor, trained: torch.Tensor, exists: torch.Tensor) -> list[Round]:
    """
    Two rounds: one masks the trained tokens that are `drawn` `(B, R)`, the other those that are not. What `exists` and
    is not trained comes behind EOS, where nobody knows yet what there is: both mask it, neither scores it.
    """
    unknown = exists & ~trained
    return [Round(mine | unknown, mine) for mine in (drawn & trained, ~drawn & trained)]


def coupled_rounds(
    drawn: torch.Tensor, ratio: torch.Tensor, trained: torch.Tensor, exists: torch.Tensor
) -> list[Round]:
    """
    DiffuCoder's three rounds: everything masked, and the pair. `loss_weight` makes a token's estimate of them, where
    `ratio` t `(B, 1)` is the probability of being drawn: `(lp_full + (lp_drawn / t or lp_other / (1 - t))) / 2`.
    """
    drawn_round, other = coupled_pair(drawn, trained, exists)
    return [
        Round(exists, trained, 0.5 * trained),
        Round(drawn_round.masked, drawn_round.scored, 0.5 / ratio * drawn_round.scored),
        Round(other.masked, other.scored, 0.5 / (1 - ratio) * other.scored),
    ]


@dataclass
class CoupledObjective(Objective):
    r"""
    Masks each trained token with the probability t of the update, t ~ U(lower, upper), and in a second round the
    others (arXiv 2506.20639, section 4).

    Args:
        estimate (`str`, *optional*, defaults to `"diffucoder"`):
            `"diffucoder"`: the mean of a token's log-probability with the whole response masked and of that in its
            round of the pair, divided by the probability of being masked there ([`coupled_rounds`]). `"pair"`: the
            log-probability in its round of the pair.
        lower, upper (`float`, *optional*, defaults to `0.2` and `0.8`):
            t lies between them.
        num_views (`int`, *optional*, defaults to `1`):
            Updates on a rollout, each with a pair of its own.
    """

    partial: ClassVar[bool] = False

    estimate: str = "diffucoder"
    lower: float = 0.2
    upper: float = 0.8
    num_views: int = 1

    def __post_init__(self):
        check_choices(self, estimate=("diffucoder", "pair"))
        check_counts(self, "num_views")
        check_shares(self, "lower", "upper")
        if not (self.lower > 0 and self.upper < 1):
            raise ValueError(
                f"`lower={self.lower}`, `upper={self.upper}`: both halves of a pair must mask something, so that "
                "0 < lower and upper < 1."
            )

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        levels = random.levels(rows.trained.any(1, keepdim=True).expand(-1, self.num_views))
        uniform = torch.stack([random.uniform(rows.trained) for _ in range(self.num_views)], dim=1)
        drawn, ratio = random_mask(uniform, levels.unsqueeze(2), self.lower, self.upper)
        return {"drawn": drawn, "ratio": ratio}  # (B, V, R), (B, V, 1)

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        drawn, ratio = rows.draws["drawn"][:, view], rows.draws["ratio"][:, view]
        exists = rows.canvas_mask.bool()
        if self.estimate == "pair":
            return coupled_pair(drawn, rows.trained, exists)
        return coupled_rounds(drawn, ratio, rows.trained, exists)
