"""Left to right: what a model adapted from an autoregressive one was trained on before."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...types import Round


@dataclass
class AutoregressiveObjective:
    """Scores every trained token once, from the clean tokens before it, under causal attention. Nothing is masked."""

    attentions: ClassVar[tuple[str, ...]] = ("block", "full")
    causal: ClassVar[bool] = True
    fills: ClassVar[bool] = False

    def num_levels(self, batch: dict[str, torch.Tensor], block_length: int | None) -> torch.Tensor:
        return torch.zeros_like(batch["scored"][:, 0], dtype=torch.long)

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]:
        # `masked` is what is predicted: the trainer lays it out with `pack_causal`, which masks nothing
        return [Round(masked=batch["scored"], scored=batch["scored"])]
