"""How many tokens a denoising step asks for. One with parameters is a dataclass, as among the samplers."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np

from .samplers.common import built


def even(step: np.ndarray, masked: np.ndarray, width: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Block width // steps, the remainder to the earliest steps; after the last one, all that is masked."""
    return np.where(step < steps, width // steps + (step < width % steps), masked)


@dataclass
class Dream:
    """`int(masked * (1 - s / t))` on `linspace(1, eps, steps + 1)`, what is left on the last step."""

    eps: float = 1e-3

    def __call__(self, step: np.ndarray, masked: np.ndarray, width: np.ndarray, steps: np.ndarray) -> np.ndarray:
        step = np.minimum(step, steps - 1)
        earlier, later = (1 - (1 - self.eps) * at / steps for at in (step, step + 1))
        return np.where(step == steps - 1, masked, (masked * (1 - later / earlier)).astype(np.int64))


SCHEDULES = {"even": even, "dream": Dream}


def make_quotas(
    schedule: str, denoising_steps: int | None, values: dict[str, Any]
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """
    `(step in the block, masked tokens, width of the block) -> tokens to commit`, with the parameters of the schedule
    from `values`; without `denoising_steps` a block has as many as tokens.
    """
    function = SCHEDULES[schedule]
    if is_dataclass(function):
        function = built(function, values)
    return lambda step, masked, width: function(step, masked, width, denoising_steps or width)
