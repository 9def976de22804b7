"""Which responses count as wrong, which groups are dropped, and what each response is worth. Tensors only."""

import torch


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
