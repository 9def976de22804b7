"""Trace SFT: the rounds of TraceRL on recorded responses whose `step_map` the dataset holds."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .trace import TraceObjective


@dataclass
class TraceSFTObjective(TraceObjective):
    """Scores every token once, in the context it was committed in. `shrink` as in [`trace_rounds`]."""

    attentions: ClassVar[tuple[str, ...]] = ("block", "full")
    step_map: ClassVar[str] = "required"
    fills: ClassVar[bool] = False

    def num_levels(self, batch: dict[str, torch.Tensor], block_length: int | None) -> torch.Tensor:
        return torch.zeros_like(batch["scored"][:, 0], dtype=torch.long)
