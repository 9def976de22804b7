"""EGSPO-SA (arXiv 2603.12554): the steps of which the model was least sure, and what each of them was worth."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import Round, Rows
from .base import LossInputs, LossOutputs, Objective, Outcome
from .option_checks import check_choices, check_counts, check_weights
from .steps import least_sure_steps, step_advantages, step_loss, step_rounds


@dataclass
class EGSPOObjective(Objective):
    """The `num_steps` steps whose tokens have the largest mean entropy. A step's advantage mixes the reward with
    `lam` times what the response gained over the canvas before the step, completed greedily, `normalize`d by
    `1 + lam`; `agg` as in [`step_loss`]."""

    step_map: ClassVar[str] = "required"
    reads_entropies: ClassVar[bool] = True
    token_advantages: ClassVar[bool] = True

    num_steps: int = 8
    lam: float = 0.5
    normalize: bool = True
    agg: str = "sum"

    def __post_init__(self):
        check_counts(self, "num_steps")
        check_weights(self, "lam")
        check_choices(self, agg=("sum", "mean"), normalize=(True, False))

    def _steps(self, rows: Rows) -> torch.Tensor:
        return least_sure_steps(rows.step_map, rows.entropies, rows.trained, self.num_steps)

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return step_rounds(rows.step_map, rows.trained, self._steps(rows))

    def completes(self, rows: Rows) -> list[torch.Tensor]:
        return [r.masked for r in self.rounds(rows)] if self.lam else []

    def advantages(self, values: torch.Tensor, outcome: Outcome) -> torch.Tensor:
        if not self.lam:
            return values
        siblings, options = outcome.num_generations, (self.lam, self.normalize)
        worth = step_advantages(outcome.total, outcome.completed, siblings, *options)[outcome.mine]
        rounds = self.rounds(outcome.rows)
        return sum(r.scored * own for r, own in zip(rounds, worth.split(1, 1), strict=True)).to(values.dtype)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        scored, new = torch.stack([r.scored for r in inputs.rounds]), inputs.logps
        old = new.detach() if inputs.old_logps is None else inputs.old_logps
        count, worth = scored.sum(-1).clamp(min=1), inputs.advantages
        worth = worth.expand(count.shape) if worth.dim() == 1 else (worth * scored).sum(-1) / count
        clip, per_step = (inputs.epsilon_low, inputs.epsilon_high), count if self.agg == "sum" else None
        loss = step_loss(new, old, inputs.ref_logps, worth, scored, clip, inputs.beta, self.agg, per_step)
        return LossOutputs(loss)
