"""Steps of a rollout, row by row: what objectives share that choose among them."""

from dataclasses import replace

import torch

from ..types import Round
from .ratios import clipped_surrogate, kl_estimate


def per_step(values: torch.Tensor, step_map: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sums `(B, T)` of `values` `(B, R)` over the tokens of `counted` that each of the `T` steps committed."""
    sums = values.new_zeros(len(values), max(int(step_map.max()) + 1, 1))
    return sums.scatter_add(1, step_map.clamp(min=0), values * (counted & (step_map >= 0)))


def renumbered(step_map: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Steps without a token of `counted` `(B, R)` left out: the place `(B, R)` of each of its tokens' steps among those
    that are left, -1 elsewhere, and the step `(B, T)` in each place.
    """
    there = per_step(counted.long(), step_map, counted) > 0
    places = (there.cumsum(1) - 1).gather(1, step_map.clamp(min=0))
    return places.where(counted & (step_map >= 0), -1), (~there).long().argsort(dim=1, stable=True)


def step_rounds(step_map: torch.Tensor, trained: torch.Tensor, steps: torch.Tensor) -> list[Round]:
    """A round for each of `steps` `(B, K)`: the canvas before it, its tokens scored; none where it is -1."""
    each = steps.unsqueeze(2).unbind(1)
    return [Round((step_map >= s) & (s >= 0), (step_map == s) & (s >= 0) & trained) for s in each]


def sample_steps(
    step_map: torch.Tensor, counted: torch.Tensor, numbers: torch.Tensor, entropies: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Steps `(B, K)` below T = 1 + the last with a token of `counted` `(B, R)`, at `numbers` `(B, K)` of the cumulative
    distribution that is uniform, or in proportion to the summed `entropies` of a step; and weights (1/T) / p of them.
    Rows without such a token get step -1 and weight 0.
    """
    last = step_map.where(counted, -1).amax(1, keepdim=True)
    mass = below = (torch.arange(max(int(step_map.max()) + 1, 1), device=last.device) <= last).double()  # (B, T)
    if entropies is not None:
        mass = below * per_step(entropies.double(), step_map, step_map >= 0)
        mass = mass.where(mass.sum(1, keepdim=True) > 0, below)
    points = mass.cumsum(1)
    steps = torch.searchsorted(points, numbers.double() * points[:, -1:], right=True).clamp(max=last.clamp(min=0))
    weights = points[:, -1:] / (last + 1) / mass.gather(1, steps)
    return steps.where(last >= 0, -1), weights.where(last >= 0, 0.0).float()


def drawn_rounds(
    step_map: torch.Tensor, trained: torch.Tensor, steps: torch.Tensor, weights: torch.Tensor
) -> list[Round]:
    """A round for each draw of `steps` and `weights` `(B, K)`; a repeated draw scores nothing and adds its weight to
    the first."""
    same = steps.unsqueeze(2) == steps.unsqueeze(1)  # (B, K, K)
    first = same.int().argmax(2) == torch.arange(steps.size(1), device=steps.device)
    shares = (same * weights.unsqueeze(1)).sum(2)
    rounds = step_rounds(step_map, trained, steps.where(first, -1))
    return [replace(r, loss_weight=w.expand(trained.shape)) for r, w in zip(rounds, shares.split(1, 1), strict=True)]


def least_sure_steps(
    step_map: torch.Tensor, entropies: torch.Tensor, counted: torch.Tensor, count: int
) -> torch.Tensor:
    """Steps `(B, count)` whose tokens of `counted` have the largest mean entropy, these first, the earlier of equal
    ones; -1 where a row has no more."""
    tokens = per_step(counted.double(), step_map, counted)
    means = per_step(entropies.double(), step_map, counted) / tokens
    means, steps = means.where(tokens > 0, -torch.inf).sort(dim=1, descending=True, stable=True)
    chosen = steps.where(means > -torch.inf, -1)[:, :count]
    return torch.nn.functional.pad(chosen, (0, count - chosen.size(1)), value=-1)


def step_advantages(
    rewards: torch.Tensor, completed: torch.Tensor, num_generations: int, lam: float = 0.5, normalize: bool = True
) -> torch.Tensor:
    """
    Advantages `(N, K)` of steps: the reward `(N,)` of the response, and `lam` times what it exceeds that of the canvas
    before the step by, `completed` `(N, K)`, over `1 + lam` with `normalize`; minus the mean over the siblings' steps
    of the same place. NaN is left out, and worth 0.
    """
    worth = rewards.double().unsqueeze(1) * (1 + lam) - lam * completed.double()
    grouped = (worth / (1 + lam) if normalize else worth).view(-1, num_generations, completed.size(1))
    return (grouped - grouped.nanmean(1, keepdim=True)).nan_to_num(0.0).view(completed.shape)


def step_loss(new, old, ref, worth, scored, clip, beta=0.0, agg="sum", tokens_per_step=None):
    """
    Mean over the steps of a response, then over responses. `worth` `(K, B)`; log-probabilities and `scored`
    `(K, B, R)`. A step has the sum (`agg="sum"`) or the mean of its tokens', and its loss is divided by
    `tokens_per_step`.
    """
    count = scored.sum(-1)

    def of_steps(logps: torch.Tensor) -> torch.Tensor:
        return (logps * scored).sum(-1) / (count.clamp(min=1) if agg == "mean" else 1)

    loss = -clipped_surrogate(of_steps(new) - of_steps(old), worth, *clip)
    if beta:
        loss = loss + beta * kl_estimate(of_steps(new) - of_steps(ref))
    loss = loss / (1 if tokens_per_step is None else tokens_per_step) * (count > 0)
    return (loss.sum(0) / (count > 0).sum(0).clamp(min=1)).mean()
