"""Weights that are normalised over all rows of an optimizer step, before the first of its micro-batches is trained."""

import torch
from trl.models.utils import disable_gradient_checkpointing

from ..types import Rows


def weigh_batch(trainer, window: list[dict[str, torch.Tensor]]) -> None:
    """
    Writes `batch_weights` `(B,)` into each micro-batch of an optimizer step: the softmax of what
    [`Objective.log_weights`] says of the rows of all of them and of all processes, times their number. The weights of
    the model are those that the losses will see, so that nothing changes with how the rows are split.
    """
    logs = []
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        for inputs in window:
            _, parts = trainer._score(trainer.model_wrapped, inputs, Rows.from_batch(inputs, trainer.grid))
            logs.append(trainer.objective.log_weights(parts))
    if logs[0] is None:
        return
    mine = torch.cat(logs)
    every = trainer.accelerator.gather(mine)
    weights = (mine - every.logsumexp(0)).exp() * len(every)
    for inputs, part in zip(window, weights.split([len(log) for log in logs]), strict=True):
        inputs["batch_weights"] = part
