"""Corruptions that several objectives share: pure functions of numbers that an objective drew and a row keeps."""

import torch

from ..types import Round, Rows
from .base import Random


def random_mask(
    uniform: torch.Tensor, level: torch.Tensor, lower: float = 0.1, upper: float = 0.9
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks a token if its `uniform` `(..., R)` lies below the ratio t = lower + (upper - lower) * `level`. The level, in
    [0, 1), is that of a row `(..., 1)` or of each token `(..., R)`. Returns the mask, and t.
    """
    ratio = lower + (upper - lower) * level
    return uniform < ratio, ratio


def mask_counted(trained: torch.Tensor, count: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Exactly `count` `(B, 1)` tokens of `trained` `(B, R)`, or all there are: those of the smallest `uniform`."""
    order = uniform.masked_fill(~trained, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    return trained & (order < count)


def block_random_masks(
    trained: torch.Tensor,
    blocks: torch.Tensor,
    place: torch.Tensor,
    share: torch.Tensor,
    uniform: torch.Tensor,
    earlier: float = 0.15,
) -> torch.Tensor:
    r"""
    What decoding block by block sees, roughly (SPG, arXiv 2510.09541): one block of the response is masked in part,
    all of what comes after it, and little of what comes before.

    Args:
        trained (`torch.BoolTensor` of shape `(B, R)`):
            Response tokens that may be masked.
        blocks (`torch.LongTensor` of shape `(B, R)`):
            Block of each token, ascending.
        place (`torch.FloatTensor` of shape `(B, 1)`):
            Number in [0, 1) that picks one of the blocks that hold a trained token.
        share (`torch.FloatTensor` of shape `(B, 1)`):
            Number in [0, 1) that says how many of its `n` trained tokens are masked: 1 to `n`, equally likely.
        uniform (`torch.FloatTensor` of shape `(B, R)`):
            Number in [0, 1) of each token. The smallest of the block are masked.
        earlier (`float`, *optional*, defaults to `0.15`):
            Tokens of earlier blocks whose number is below it are masked.

    Returns:
        `torch.BoolTensor` of shape `(B, R)`: trained tokens that are masked.
    """
    blocks = blocks - blocks[:, :1]
    has = torch.zeros_like(blocks).scatter_reduce(1, blocks, trained.long(), "amax")
    number = has.sum(1, keepdim=True)
    chosen = torch.minimum((place * number).long(), number - 1)  # rounding may reach the number itself
    current = ((has * has.cumsum(1)) == chosen + 1).long().argmax(1, keepdim=True)
    mine = trained & (blocks == current)
    width = mine.sum(1, keepdim=True)
    part = mask_counted(mine, 1 + (share * width).long(), uniform)
    return part | trained & ((blocks > current) | (blocks < current) & (uniform < earlier))


def draw_prompt(rows: Rows, random: Random) -> torch.Tensor:
    """A number `(B, P)` for each prompt token: the same however the prompt is padded."""
    exists = rows.prompt_mask.bool()
    first = torch.arange(exists.size(1), device=exists.device) < exists.sum(1, keepdim=True)
    numbers = random.uniform(first)
    return torch.zeros_like(numbers).masked_scatter(exists, numbers[first])


def draw_block_random(rows: Rows, random: Random, num_samples: int, name: str = "") -> dict[str, torch.Tensor]:
    """What [`block_random_rounds`] is made of, for as many draws as it is to have, under keys that begin with
    `name`."""
    once = rows.trained.any(1, keepdim=True)
    drawn = {f"{name}place": random.uniform(once), f"{name}prompt": draw_prompt(rows, random)}
    for sample in range(num_samples):
        drawn[f"{name}share{sample}"] = random.uniform(once)
        drawn[f"{name}mask{sample}"] = random.uniform(rows.trained)
    return drawn


def block_random_rounds(rows: Rows, num_samples: int, name: str = "", earlier: float = 0.15) -> list[Round]:
    """
    `num_samples` corruptions of [`block_random_masks`], each with another block of the response as long as there are
    enough, that score all trained tokens they mask. Prompt tokens are masked with probability `earlier`, and so is
    whatever comes after the trained tokens, always.
    """
    draws, trained, rounds = rows.draws, rows.trained, []
    unknown = rows.canvas_mask.bool() & ~trained & trained.any(1, keepdim=True)
    prompt_masked = rows.prompt_mask.bool() & (draws[f"{name}prompt"] < earlier)
    for sample in range(num_samples):
        place = (draws[f"{name}place"] + sample / num_samples) % 1
        share, uniform = draws[f"{name}share{sample}"], draws[f"{name}mask{sample}"]
        scored = block_random_masks(trained, rows.blocks, place, share, uniform, earlier)
        rounds.append(Round(scored | unknown, scored, prompt_masked=prompt_masked))
    return rounds


def spread_counts(first: torch.Tensor, number: int, length: torch.Tensor, least: int = 1) -> torch.Tensor:
    """
    How many tokens each of `number` corruptions `(B, number)` masks: from `first` `(B, 1)` on, evenly spread over
    `least` to `length` `(B, 1)` and beginning anew beyond the end. LLaDA's counts; with `least=0`, those of ESPO.
    """
    states = length + 1 - least
    steps = torch.arange(number, device=length.device) * states.double() / number
    return (first + steps).round().long().sub(least) % states.clamp(min=1) + least


def draw_counted(rows: Rows, random: Random, num_samples: int, num_views: int) -> dict[str, torch.Tensor]:
    """What [`counted_masks`] is made of: for each view where the counts begin, and a number for each token."""
    names = [f"mask{view}_{sample}" for view in range(num_views) for sample in range(num_samples)]
    first = random.uniform(rows.trained.any(1, keepdim=True).expand(-1, num_views))
    return {"first": first} | {name: random.uniform(rows.trained) for name in names}


def counted_masks(rows: Rows, view: int, num_samples: int, least: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`num_samples` masks `(B, R)` and their counts `(B, 1)`: exactly so many trained tokens, `least` to all, evenly
    spread over the masks of a row."""
    length = rows.trained.sum(1, keepdim=True)
    # From a real number on: from an integer on, as LLaDA does it, rounding halves to even would prefer even counts
    first = least - 0.5 + rows.draws["first"][:, view : view + 1].double() * (length + 1 - least)
    counts = spread_counts(first, num_samples, length, least).split(1, dim=1)
    uniform = [rows.draws[f"mask{view}_{sample}"] for sample in range(num_samples)]
    return [(mask_counted(rows.trained, count, one), count) for count, one in zip(counts, uniform, strict=True)]
