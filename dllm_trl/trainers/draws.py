"""Where an objective's random numbers come from: functions of a seed and a place, so that a run can be repeated."""

import numpy as np
import torch

from ..generation.sampling import uniform as uniform_at


def make_generator(*seeds: int) -> torch.Generator:
    """A generator whose numbers have nothing to do with those of neighbouring seeds."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def draw_levels(count: int, generator: torch.Generator, antithetic: bool) -> torch.Tensor:
    """`count` noise levels in [0, 1); antithetic ones lie in a stratum of `1 / count` each, in random order."""
    uniform = torch.rand(count, generator=generator)
    return (uniform + torch.randperm(count, generator=generator)) / max(count, 1) if antithetic else uniform


def _spread(where: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(where.shape, device=where.device).masked_scatter(where, values.to(where.device))


class CountedDraws:
    """Draws nothing: counts how many numbers an objective asks for."""

    def __init__(self):
        self.num_levels = self.num_uniform = 0

    def levels(self, where: torch.Tensor) -> torch.Tensor:
        self.num_levels += int(where.sum())
        return torch.zeros(where.shape, device=where.device)

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        self.num_uniform += int(where.sum())
        return torch.zeros(where.shape, device=where.device)


class PooledDraws:
    """Hands out numbers that were drawn for a whole step, `(n,)` each, in the order of the rows."""

    def __init__(self, levels: torch.Tensor, uniform: torch.Tensor):
        self.pools = {"levels": levels, "uniform": uniform}

    def _take(self, name: str, where: torch.Tensor) -> torch.Tensor:
        count = int(where.sum())
        taken, self.pools[name] = self.pools[name][:count], self.pools[name][count:]
        return _spread(where, taken)

    def levels(self, where: torch.Tensor) -> torch.Tensor:
        return self._take("levels", where)

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        return self._take("uniform", where)


class RowDraws:
    """Each row draws from a generator of its own."""

    def __init__(self, generators: list[torch.Generator], antithetic: bool):
        self.generators, self.antithetic = generators, antithetic

    def levels(self, where: torch.Tensor) -> torch.Tensor:
        counts = zip(where.sum(1).tolist(), self.generators, strict=True)
        return _spread(where, torch.cat([draw_levels(count, own, self.antithetic) for count, own in counts]))

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        counts = zip(where.sum(1).tolist(), self.generators, strict=True)
        return _spread(where, torch.cat([torch.rand(count, generator=own) for count, own in counts]))


class CountingDraws:
    """
    Reinforcement learning: a number is a hash of the run's seed, the row's place in the run, how often the objective
    has drawn, and the column.
    """

    def __init__(self, seed: int, first_row: int):
        self.seed, self.first_row, self.calls = seed, first_row, 0

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        rows, columns = np.ogrid[: where.size(0), : where.size(1)]
        numbers = torch.from_numpy(uniform_at(self.seed, self.first_row + rows, self.calls, columns))
        self.calls += 1
        return numbers.to(where.device) * where

    levels = uniform
