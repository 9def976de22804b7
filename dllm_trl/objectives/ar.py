"""Left to right: what a model adapted from an autoregressive one was trained on before."""

from dataclasses import dataclass
from typing import ClassVar

from ..types import Round, Rows
from .base import Objective


@dataclass
class AutoregressiveObjective(Objective):
    """Scores every trained token once, from the clean tokens before it, under causal attention. Nothing is masked."""

    causal: ClassVar[bool] = True
    fills: ClassVar[bool] = False

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        # `masked` is what is predicted: the layout of causal objectives masks nothing
        return [Round(masked=rows.trained, scored=rows.trained)]
