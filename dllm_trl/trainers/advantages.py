"""Which responses count as wrong, which groups are dropped, and what each response is worth."""

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from accelerate.logging import get_logger

from ..objectives import Outcome
from .gae import outcome_token_rewards, step_gae


logger = get_logger(__name__)

LIST_GAMMA = 0.99  # discount per denoising step of rewards that came as lists


def is_overlong(lengths: torch.Tensor, ended: torch.Tensor, limit: int, slack: int) -> torch.Tensor:
    """
    Responses that ran too long.

    Args:
        lengths (`torch.LongTensor` of shape `(B,)`):
            Response lengths in tokens.
        ended (`torch.BoolTensor` of shape `(B,)`):
            Whether the response ends with EOS.
        limit (`int`):
            Tokens a response may have at most.
        slack (`int`):
            A response of `limit - slack` tokens is too long already. With 0, reaching the limit with an EOS is fine.

    Returns:
        `torch.BoolTensor` of shape `(B,)`.
    """
    return lengths >= limit - slack if slack else (lengths >= limit) & ~ended


def in_accuracy_range(rewards: torch.Tensor, num_generations: int, low: float, high: float) -> torch.Tensor:
    """
    Responses whose group is neither too hard nor too easy.

    Args:
        rewards (`torch.FloatTensor` of shape `(B,)`):
            Rewards, siblings adjacent; above 0.5 is accurate. NaN (no reward) is left out, a group of NaN is kept.
        num_generations (`int`):
            Responses per group.
        low, high (`float`):
            Groups whose accuracy lies in `[low, high]` are kept, bounds included.

    Returns:
        `torch.BoolTensor` of shape `(B,)`.
    """
    grouped = rewards.double().view(-1, num_generations)
    accuracy = torch.where(grouped.isnan(), torch.nan, (grouped > 0.5).double()).nanmean(1)
    kept = accuracy.isnan() | ((accuracy >= low - 1e-9) & (accuracy <= high + 1e-9))
    return kept.repeat_interleave(num_generations)


def population_z_score(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Rewards minus their group's mean, over the group's population standard deviation.

    Args:
        rewards (`torch.FloatTensor` of shape `(B,)`):
            Rewards, siblings adjacent. NaN (no reward) is left out.
        num_generations (`int`):
            Responses per group.

    Returns:
        `torch.FloatTensor` of shape `(B,)`, 0 for groups whose rewards are all equal and for NaN.
    """
    grouped = rewards.double().view(-1, num_generations)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    deviation = centred.square().nanmean(1, keepdim=True).sqrt()
    return torch.where(deviation > 1e-8, centred / deviation, 0.0).nan_to_num(0.0).flatten().to(rewards.dtype)


def leave_one_out(rewards: torch.Tensor, num_generations: int, scale: bool = False) -> torch.Tensor:
    """
    Rewards minus the mean of the others of their group: `n / (n - 1)` times the centred ones (RLOO, DiffuCoder).

    Args:
        rewards (`torch.FloatTensor` of shape `(B,)`):
            Rewards, siblings adjacent. NaN (no reward) is left out.
        num_generations (`int`):
            Responses per group.
        scale (`bool`, *optional*, defaults to `False`):
            Whether they are divided by the group's sample standard deviation plus 1e-4, TRL's scale.

    Returns:
        `torch.FloatTensor` of shape `(B,)`, 0 for NaN and for the only reward of a group.
    """
    grouped = rewards.double().view(-1, num_generations)
    others = ((~grouped.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    values = centred * (others + 1) / others
    if scale:
        values = values / ((centred.square().nansum(1, keepdim=True) / others).sqrt() + 1e-4)
    return values.nan_to_num(0.0).flatten().to(rewards.dtype)


# Advantages beside TRL's own, by the names that `scale_rewards` has for them
SCALES = {
    "population": population_z_score,
    "leave_one_out": leave_one_out,
    "leave_one_out_scaled": partial(leave_one_out, scale=True),
}


@dataclass
class Advantage:
    r"""
    Args:
        values (`torch.FloatTensor` of shape `(N,)` or `(B, R)`):
            What each response, or each token of this process's responses, is worth.
        kept (`torch.BoolTensor` of shape `(N,)`):
            Responses that count; nothing of the others is scored.
        notes (`dict[str, torch.Tensor]`, each of shape `(N, ...)`, *optional*):
            What [`Objective.notes`] says.
    """

    values: torch.Tensor
    kept: torch.Tensor
    notes: dict[str, torch.Tensor] = field(default_factory=dict)


def rewards_on_tokens(values: torch.Tensor, outcome: Outcome, step_map: torch.Tensor) -> torch.Tensor:
    """
    Rewards `(B, R)` of this process's tokens: the normalised reward of each response, one of `values` `(N,)`, on all
    tokens of its last trained step in `step_map` `(B, R)`, and what came as lists where `outcome` says.
    """
    rewards = outcome_token_rewards(values[outcome.mine], step_map, outcome.rows.trained)
    return rewards if outcome.token_rewards is None else rewards + outcome.token_rewards


def discount(gamma: float | None, outcome: Outcome) -> float:
    """What a reward is worth one denoising step earlier: by default 1, and less where rewards came as lists."""
    if gamma is not None:
        return gamma
    return 1.0 if outcome.token_rewards is None else LIST_GAMMA


class Estimator(Protocol):
    """Says what the responses of a rollout are worth."""

    def __call__(self, outcome: Outcome) -> Advantage: ...


@dataclass
class GroupEstimator:
    """
    A response against its siblings, as TRL computes it, or as one of [`SCALES`] says. Groups outside `accuracy_range`
    are dropped. Where rewards came as lists, a token is worth the rewards from its step on, each discounted by `gamma`
    per step.
    """

    scale: str = "group"
    accuracy_range: tuple[float, float] | None = None
    gamma: float | None = None

    def responses(self, outcome: Outcome) -> Advantage:
        """What whole responses are worth, by those of their rewards that are numbers."""
        values, kept = outcome.advantages, torch.ones_like(outcome.advantages, dtype=torch.bool)
        if self.scale in SCALES:
            total = outcome.total if outcome.numbers is None else outcome.numbers
            values = SCALES[self.scale](total, outcome.num_generations)
        if self.accuracy_range is not None:
            kept = in_accuracy_range(outcome.rewards[:, 0], outcome.num_generations, *self.accuracy_range)
            values = torch.where(kept, values, 0.0)
        return Advantage(values, kept)

    def __call__(self, outcome: Outcome) -> Advantage:
        worth, rows = self.responses(outcome), outcome.rows
        if outcome.token_rewards is None:
            return worth
        rewards, gamma = rewards_on_tokens(worth.values, outcome, rows.step_map), discount(self.gamma, outcome)
        returns = step_gae(rows.step_map, rows.trained, rewards, torch.zeros_like(rewards), gamma).returns
        return Advantage(returns * worth.kept[outcome.mine].unsqueeze(1), worth.kept)


class SignalWatch:
    """Says when a rollout has nothing to teach: early and again, not in every step."""

    def __init__(self, names: list[str], accuracy_range):
        self.names, self.accuracy_range, self.count = names, accuracy_range, 0

    def __call__(self, rewards: torch.Tensor, advantage: Advantage) -> None:
        if (advantage.values.abs() > 1e-8).any():
            return
        self.count += 1
        if self.count not in (1, 10, 100, 1000, 10000):
            return
        batches = f"Rollouts of this run without any so far: {self.count}."
        means = ", ".join(f"{name} {m:.3g}" for name, m in zip(self.names, rewards.nanmean(0).tolist(), strict=True))
        if not advantage.kept.any():
            logger.warning(
                f"All groups were dropped: none passes `accuracy_range={self.accuracy_range}` (a response is accurate "
                "if the first of `reward_funcs` gives more than 0.5) and what the objective asks of them. This step "
                f"has no gradient. Widen `accuracy_range`, or use problems the model solves sometimes. {batches}"
            )
        elif (rewards[:, 0] > 0.5).all():
            logger.warning(
                "All answers of this step are right (the first of `reward_funcs` gives each more than 0.5; mean "
                f"rewards: {means}), and equal within each group, so every advantage is 0 and the policy loss teaches "
                f"nothing. Use harder problems, or a higher `temperature`. {batches}"
            )
        else:
            logger.warning(
                "No group has any reward signal: within each group of responses to the same prompt all rewards are "
                f"equal (mean rewards: {means}), so every advantage is 0 and the policy loss teaches nothing. Use "
                "easier or harder problems, raise `num_generations` or `temperature`, or check that `reward_funcs` "
                "can read the answers and that `max_completion_length` leaves room for them. " + batches
            )
