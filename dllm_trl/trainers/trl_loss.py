"""What is between us and TRL's loss: scores in place of a model, its inputs, settings for one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..objectives import LossInputs, LossOutputs
from ..scoring import Scores


# Largest difference of log-probabilities to the old policy: exp(10) is far outside of every clipping range
_MAX_LOG_RATIO = 10.0


class ScoredModel(NamedTuple):
    """
    Stands for the model in `GRPOTrainer._compute_loss`, which does nothing with it but ask for these: `logps` and
    `entropies` `(B, R)`, and the load-balancing loss of experts.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    aux_loss: torch.Tensor | None

    @classmethod
    def of(cls, parts: LossInputs, scores: Scores) -> "ScoredModel":
        logps, old = parts.logps, parts.old_logps
        if old is not None:  # no gradient beyond the bounds
            logps = old + (logps - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return cls(logps, scores.mean("entropies"), scores.aux_loss)


@contextmanager
def temporarily(trainer, **settings) -> Iterator[None]:
    """Attributes of TRL's trainer with other values for one call of a method of TRL's that reads them."""
    before = {name: getattr(trainer, name) for name in settings}
    for name, value in settings.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def trl_inputs(trainer, inputs: dict, parts: LossInputs, num_items: torch.Tensor) -> tuple[dict, dict[str, float]]:
    """
    What TRL's loss takes, and the settings it is to be computed with. To TRL the completion is the canvas, of which
    the scored tokens count.
    """
    inputs = inputs | {
        "completion_ids": parts.rows.canvas_ids,
        "completion_mask": parts.scored.long(),
        "num_items_in_batch": num_items,
        "old_per_token_logps": parts.old_logps,
        "ref_per_token_logps": parts.ref_logps,
    }
    settings, scale = {}, inputs.get("kept_scale")
    if scale is not None:  # of the KL term alike
        inputs["advantages"], settings["beta"] = parts.advantages * scale, trainer.beta * scale.item()
    if not trainer.model.training:  # these are no mean over what an evaluation holds, and have metrics of their own
        settings |= {"entropy_coef": 0.0, "router_aux_loss_coef": 0.0}
    return inputs, settings


def own_loss(trainer, own: LossOutputs, scores: Scores) -> torch.Tensor:
    """An objective's own loss, with the metrics and the auxiliary loss that TRL adds to its own."""
    training, gather = trainer.model.training, trainer.accelerator.gather
    metrics = trainer._metrics["train" if training else "eval"]
    for name, value in own.metrics.items():
        metrics[name].append(gather(value.detach().float()).mean().item())
    metrics["entropy"].append(gather(scores.mean("entropies").sum() / max(len(scores.logps), 1)).mean().item())
    loss = own.loss
    if trainer.aux_loss_enabled:
        metrics["aux_loss"].append(gather(scores.aux_loss.detach()).mean().item())
        if training:
            loss = loss + trainer.router_aux_loss_coef * scores.aux_loss
    return loss / (trainer.current_gradient_accumulation_steps if training else 1)
