"""UniGRPO (MMaDA): a response is masked at random, and all that is masked is scored; the prompt is always seen."""

from dataclasses import dataclass

import torch

from ..types import Round, Rows
from .base import Objective, Random, any_scored
from .corruptions import random_mask
from .option_checks import check_choices, check_counts, check_shares


def unigrpo_ratios(first: torch.Tensor, count: int) -> torch.Tensor:
    """Levels `(B, count)` in [0, 1): the `first` `(B, 1)`, and others behind it, evenly spaced around the circle."""
    return (first + torch.arange(count, device=first.device) / count) % 1


def unigrpo_sequence_logp(logps: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """
    Log-likelihood `(B,)` of responses: the mean of `logps` `(K, B, R)` over the tokens that a view masks, `masked`
    `(K, B, R)`, then over the views that mask any of the row.
    """
    counts = masked.sum(-1)
    means = torch.where(masked, logps, 0.0).sum(-1) / counts.clamp(min=1)
    return means.sum(0) / (counts > 0).sum(0).clamp(min=1)


@dataclass
class UniGRPOObjective(Objective):
    r"""
    Masks each trained token with the probability t of the update, and scores what is masked (arXiv 2505.15809).

    Args:
        lower, upper (`float`, *optional*, defaults to `0.0` and `1.0`):
            t lies between them.
        ratios (`str`, *optional*, defaults to `"spaced"`):
            `"spaced"`: the t of a response's first update is uniform, those of the others are evenly spaced around it
            ([`unigrpo_ratios`]). `"uniform"`: each is drawn anew.
        num_masks (`int`, *optional*, defaults to `1`):
            Masks per update. A token's log-probability is the mean over those that mask it.
        likelihood (`str`, *optional*, defaults to `"token"`):
            `"token"`: each token has its own ratio to the old policy. `"sequence"`: all of a response have that of
            [`unigrpo_sequence_logp`].
        num_views (`int`, *optional*, defaults to `1`):
            Updates on a rollout, each with masks of its own.
    """

    lower: float = 0.0
    upper: float = 1.0
    ratios: str = "spaced"
    num_masks: int = 1
    likelihood: str = "token"
    num_views: int = 1

    def __post_init__(self):
        check_shares(self, "lower", "upper")
        check_choices(self, ratios=("spaced", "uniform"), likelihood=("token", "sequence"))
        check_counts(self, "num_masks", "num_views")

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        some, count = rows.trained.any(1, keepdim=True), self.num_views * self.num_masks
        spaced = self.ratios == "spaced"
        levels = unigrpo_ratios(random.levels(some), count) if spaced else random.levels(some.expand(-1, count))
        uniform = torch.stack([random.uniform(rows.trained) for _ in range(count)], dim=1)  # (B, V * K, R)
        masked, _ = random_mask(uniform, levels.unsqueeze(2), self.lower, self.upper)
        return {"masked": masked & rows.trained.unsqueeze(1)}

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        unknown = rows.canvas_mask.bool() & ~rows.trained  # nobody knows yet what comes behind EOS
        # Every `num_views`-th mask: those of one update are evenly spaced among themselves
        drawn = rows.draws["masked"][:, view :: self.num_views].unbind(1)
        return [Round(masked | unknown, masked) for masked in drawn]

    def reduce(self, token_logps: torch.Tensor, rounds: list[Round]) -> torch.Tensor:
        masked = torch.stack([one.scored for one in rounds])
        if self.likelihood == "sequence":
            return unigrpo_sequence_logp(token_logps, masked).unsqueeze(1) * any_scored(rounds)
        return token_logps.sum(0) / masked.sum(0).clamp(min=1)
