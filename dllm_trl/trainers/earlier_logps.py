"""What is computed of a rollout before its first update: log-probabilities under earlier policies, and counts."""

from collections.abc import Callable

import torch
from torch import nn
from trl.extras.profiling import profiling_context
from trl.models.utils import disable_gradient_checkpointing

from ..objectives import any_scored
from ..types import DiffusionRollout, Round, Rows
from .reference_model import reference_of


def micro_batches(trainer, count: int) -> list[slice]:
    """`count` rows of a rollout in micro-batches."""
    args = trainer.args
    size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    return [slice(start, start + size) for start in range(0, count, size)]


def _logps_of(trainer, model: nn.Module, rows: Rows, rounds_of: Callable[[Rows, int], list[Round]]) -> torch.Tensor:
    """Log-probabilities `(B, V, R)` of all `V` views, without gradient, a micro-batch at a time."""
    views = []
    for view in range(trainer.objective.num_views):
        parts = []
        for part in (rows[mine] for mine in micro_batches(trainer, len(rows))):
            rounds = rounds_of(part, view)
            with trainer.accelerator.autocast():
                scores = trainer.scorer(model, part, rounds)
            parts.append(trainer.objective.reduce(scores.dense("logps"), rounds))
        views.append(torch.cat(parts))
    return torch.stack(views, dim=1)


def earlier_logps(trainer, rows: Rows, rollout: DiffusionRollout) -> dict[str, torch.Tensor]:
    """
    Log-probabilities `(B, V, R)` under the policy that decoded the rollout, where the loss meets another one, and
    under the reference model.
    """
    args, objective, earlier = trainer.args, trainer.objective, {}
    generate_every = args.steps_per_generation * trainer.num_iterations
    with (
        profiling_context(trainer, "earlier_logps"),
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
    ):
        changed = objective.has_ratio and args.gradient_accumulation_steps % generate_every != 0
        if objective.needs_old or changed:
            if args.use_rollout_logprobs:
                earlier["old_logps"] = rollout.logprobs.unsqueeze(1)
            else:
                earlier["old_logps"] = _logps_of(trainer, trainer.model, rows, objective.old_rounds)
                if trainer._on_policy.recorded:
                    trainer._on_policy(trainer, earlier["old_logps"][:, 0], rollout.logprobs, rows.trained)
        if trainer.beta != 0.0 and args.kl_target == "ref":
            with reference_of(trainer) as reference:
                earlier["ref_logps"] = _logps_of(trainer, reference, rows, objective.rounds)
    return earlier


def num_scored(trainer, rows: Rows) -> dict[str, torch.Tensor]:
    """Tokens that each view scores in the generation batch of all processes, in each row of `(B, V)`."""
    objective = trainer.objective
    if not objective.partial:
        return {}
    counts = torch.zeros(objective.num_views, dtype=torch.long, device=rows.canvas_ids.device)
    for part in (rows[mine] for mine in micro_batches(trainer, len(rows))):
        counts += torch.stack([any_scored(objective.rounds(part, v)).sum() for v in range(objective.num_views)])
    return {"num_scored": trainer.accelerator.reduce(counts, "sum").expand(len(rows), -1)}
