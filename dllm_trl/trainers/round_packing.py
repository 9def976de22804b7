"""The rounds of a micro-batch as one forward pass, the same for fine-tuning and reinforcement learning."""

import torch
from transformers import Trainer

from ..modeling.packing import PackedRounds, pack_rounds
from ..types import Round


def pack_batch(trainer: Trainer, batch: dict[str, torch.Tensor], rounds: list[Round]) -> PackedRounds:
    """[`pack_rounds`] with the settings of `trainer`; with full attention, as many chunks on every process."""
    packed = pack_rounds(
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["canvas_ids"],
        batch["canvas_mask"],
        rounds,
        block_length=trainer._grid,
        mask_token_id=trainer.mask_token_id,
        logit_shift=trainer.model.config.logit_shift,
        share_prompts=trainer.args.neftune_noise_alpha is None,  # each row has noise of its own
        rounds_per_forward=trainer.args.rounds_per_forward,
    )
    if trainer._grid is None and trainer.accelerator.num_processes > 1:
        chunks = torch.tensor(len(packed.plan.plans), device=trainer.accelerator.device)
        packed = packed.pad_chunks(int(trainer.accelerator.gather(chunks).max()))
    return packed
