"""Rewards of canvases that were left half done and completed greedily: what the steps after them were worth."""

from collections import defaultdict
from dataclasses import replace

import torch
from trl import is_conversational
from trl.models.utils import disable_gradient_checkpointing

from ..generation.resolve import as_ids
from ..scoring.greedy import complete_greedily
from ..types import Rows
from .earlier_logps import micro_batches
from .metrics import new_notes
from .trl_loss import temporarily


def _to_fill(rows: Rows, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of what is `hidden` `(B, R)`, what is filled, and what exists then: with block attention up to the end of the first
    block with a hidden token, since later ones do not exist before it is full; with full attention everything, never
    decoded masks included.
    """
    exists = rows.canvas_mask.bool()
    if rows.grid.attention == "full":
        return exists & (hidden | ((rows.step_map < 0) & hidden.any(1, keepdim=True))), exists
    blocks = rows.blocks
    current = blocks.masked_fill(~hidden, int(blocks.max()) + 1).amin(1, keepdim=True)
    return hidden & (blocks == current), exists & (blocks <= current)


def greedy_rewards(trainer, inputs: list[dict], generation, rows: Rows) -> torch.Tensor | None:
    """
    Rewards `(N, K)` of the canvases that [`Objective.completes`] names, each completed by the most likely tokens in
    one step; NaN for rows of which nothing was hidden. `None`: it names none. Reward functions see the completions as
    others, with what the rollout knows of the whole response; what they log of them is dropped.
    """
    hidden = trainer.objective.completes(rows)
    if not hidden:
        return None
    fills, exist = zip(*(_to_fill(rows, one) for one in hidden), strict=True)
    config, pieces = trainer.generation_config, []
    suppressed = sorted({config.mask_token_id, *as_ids(config.suppress_tokens)})
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        trainer.accelerator.autocast(),
    ):
        for part in micro_batches(trainer, len(rows)):
            masks = [one[part] for one in fills]
            pieces.append(complete_greedily(trainer.scorer, trainer.model, rows[part], masks, suppressed))
    canvases = map(torch.cat, zip(*pieces, strict=True))
    rewards = [
        _rewards_of(trainer, inputs, generation, rows, canvas.masked_fill(~there, -1))
        for canvas, there in zip(canvases, exist, strict=True)
    ]
    known = trainer.accelerator.gather(torch.stack([fill.any(1) for fill in fills], dim=1))
    return torch.stack(rewards, dim=1).where(known, torch.nan)


def _rewards_of(trainer, inputs: list[dict], generation, rows: Rows, canvas: torch.Tensor) -> torch.Tensor:
    """Total rewards `(N,)` of completions that end with `canvas` `(B, R)`, where that is not -1, or with EOS."""
    ids = []
    for row in canvas.tolist():
        row = row[: row.index(-1)] if -1 in row else row
        ends = [place + 1 for place, token in enumerate(row) if token in trainer.eos_token_ids]
        ids.append(row[: min(ends, default=len(row))])
    completions = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    prompts = [example["prompt"] for example in inputs]
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    # What calculates rewards leaves them, and what they log, with the trainer
    own = replace(generation)
    dropped = {"_notes": new_notes(), "_pending_extra_logs": defaultdict(list), "_pending_metrics": defaultdict(list)}
    with temporarily(trainer, _generation=own, **dropped):
        trainer._calculate_rewards(inputs, prompts, completions, ids)
    return trainer._total_rewards(own.rewards)
