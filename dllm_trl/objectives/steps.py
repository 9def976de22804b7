"""Steps of a rollout, row by row: what objectives share that choose among them."""

from dataclasses import replace

import torch

from ..types import Round


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
