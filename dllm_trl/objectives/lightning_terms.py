"""What LightningRL makes of a group of responses (which are right, how fast, whether they teach), and of the loss."""

import torch

from .ratios import clipped_surrogate, kl_estimate


MAX_LOG_RATIO = 10.0  # in the ratio, and in the exponential of the KL term


def _z_score(values: torch.Tensor) -> torch.Tensor:
    """Of each row, with the population standard deviation; 0 where all values are equal."""
    centred = values - values.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return (centred / deviation).where(deviation > 1e-8, 0.0)


def speed_rewards(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    forwards: torch.Tensor,
    limit: int,
    slack: int = 5,
    least_range: float = 0.01,
    normalize_correct: bool = True,
    drop_all_wrong: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Args:
        correct (`torch.BoolTensor` of shape `(P, G)`):
            Whether each response is right, a group of siblings in each row.
        lengths, forwards (`torch.Tensor` of shape `(P, G)`):
            Its tokens, and the forward passes that decoded it.
        limit (`int`):
            Tokens a response may have; one of `limit - slack` is wrong.
        slack (`int`, *optional*, defaults to `5`):
            See `limit`.
        least_range (`float`, *optional*, defaults to `0.01`):
            A group whose tokens per forward lie closer together has no speed to compare.
        normalize_correct (`bool`, *optional*, defaults to `True`):
            `False`: a right response has 1, a wrong one -1, in place of the z-score.
        drop_all_wrong (`bool`, *optional*, defaults to `True`):
            Whether a group without a right response is dropped.

    Returns:
        `tuple`: rewards `(P, G)`, the sum of the z-scores of both; right responses `(P, G)`; tokens per forward
        `(P, G)`; and whether a group `(P,)` is kept.
    """
    correct = correct & (lengths < limit - slack)
    speed = (lengths / forwards.clamp(min=1)).where(forwards > 0, 0.0).double()
    right = _z_score(correct.double()) if normalize_correct else correct.double() * 2 - 1
    rewards = right + _z_score(speed)
    kept = (correct.any(-1) | (not drop_all_wrong)) & (speed.amax(-1) - speed.amin(-1) >= least_range)
    return rewards, correct, speed, kept


def kept_advantages(
    rewards: torch.Tensor, kept: torch.Tensor, groups: torch.Tensor, mode: str = "batch"
) -> torch.Tensor:
    """
    Advantages `(N,)` among the responses of `kept`, 0 for the others: `"batch"` centres their rewards and divides by
    their sample standard deviation, `"prompt_group"` does so within each of `groups`, `"prompt_group_center"` divides
    by nothing.
    """
    groups = torch.zeros_like(groups) if mode == "batch" else groups

    def sums(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values * kept)[groups]

    count = sums(torch.ones_like(rewards))
    centred = rewards - sums(rewards) / count
    if mode != "prompt_group_center":
        deviation = (sums(centred.square()) / (count - 1)).sqrt()
        centred = (centred / deviation).where(deviation > 1e-8, 0.0)
    return centred.where(kept, 0.0)


def step_weights(correct: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Weights `(N, 3)` of rows, whose mean over all rows is a mean over the responses of `kept`, over their `tokens`
    `(N,)`, and over those of the right ones: whatever part of the rows a micro-batch holds.
    """
    shares = torch.stack([kept.double(), kept * tokens.double(), (kept & correct) * tokens.double()])
    each = torch.stack([kept, kept, kept & correct]).double()
    return (len(kept) * each / shares.sum(1, keepdim=True).clamp(min=1)).T.float()


def bounded_kl(difference: torch.Tensor, kind: str) -> torch.Tensor:
    """[`kl_estimate`], with the exponential of k3 bounded."""
    beyond = difference - difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return kl_estimate(difference - beyond) + beyond if kind == "k3" else kl_estimate(difference, kind)


def lightning_loss(new, old, ref, advantages, scored, lengths, weights, clip, beta=0.0, kl="k3", nll_weight=0.1):
    """Policy, KL and likelihood term of `(B, R)` log-probabilities; `weights` `(B, 3)` as in [`step_weights`]."""
    surrogate = clipped_surrogate((new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), advantages, *clip)
    policy = -(surrogate * scored).sum(1) / lengths
    distance = (bounded_kl(new - ref, kl) * scored).sum(1) if beta else torch.zeros_like(policy)
    terms = policy, beta * distance, -nll_weight * (new * scored).sum(1)
    return [(term * weight).mean() for term, weight in zip(terms, weights.unbind(1), strict=True)]
