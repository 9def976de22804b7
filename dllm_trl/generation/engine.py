"""Many prompts through a fixed number of slots: refill of finished slots, and what comes out of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..types import DiffusionRollout, Grid
from .block import BlockDecoder
from .canvas import CanvasDecoder
from .decoder import DecodingSettings, Row
from .sampling import mix
from .sharded import whole_weights


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, which drops the caches it is given; each module's own state is put
    back."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@torch.no_grad()
def decode(
    model,
    prompts: list[np.ndarray],
    limits: list[int],
    settings: DecodingSettings,
    num_generations: int = 1,
    num_slots: int | None = None,
    index_offset: int = 0,
    fused: bool | None = None,
    streamer=None,
    show_progress: bool = False,
) -> DiffusionRollout:
    """Decodes `num_generations` responses to each prompt, siblings adjacent, and lays them out as a rollout on CPU."""
    rows = [
        Row(prompt, limit, mix(settings.seed, index_offset + i, sibling), i * num_generations + sibling)
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for sibling in range(num_generations)
    ]
    full = model.config.diffusion_attention == "full"
    decoder = CanvasDecoder if full else BlockDecoder
    active = [row for row in rows if row.limit or settings.mask_token_id in row.prompt]  # the others are done
    with evaluating(model), whole_weights(model):
        decoder(model, settings, fused, streamer, show_progress).run(active, num_slots or len(active))
    batch, width = len(rows), max(row.canvas_length for row in rows)
    prompt_width = max(len(row.prompt) for row in rows)
    shape = (batch, width)
    prompt_ids = np.full((batch, prompt_width), settings.pad_token_id)
    prompt_mask = np.zeros((batch, prompt_width), dtype=np.int64)
    completion_ids, canvas_ids = np.full(shape, settings.pad_token_id), np.full(shape, settings.pad_token_id)
    completion_mask, canvas_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    step_map, logprobs, entropies = np.full(shape, -1), *np.zeros((2, *shape), dtype=np.float32)
    for i, row in enumerate(rows):
        prompt_ids[i, prompt_width - len(row.prompt) :] = row.prompt
        prompt_mask[i, prompt_width - len(row.prompt) :] = 1
        completion_ids[i, : row.length], completion_mask[i, : row.length] = row.ids[: row.length], 1
        seen = slice(0, row.canvas_length)
        canvas_ids[i, seen], canvas_mask[i, seen] = row.ids[seen], 1
        step_map[i, seen], logprobs[i, seen] = row.steps[seen], row.logprobs[seen]
        entropies[i, seen] = row.entropies[seen]
    tensors = (prompt_ids, prompt_mask, completion_ids, completion_mask, canvas_ids, canvas_mask, step_map, logprobs)
    forwards = torch.tensor([row.forwards for row in rows])
    grid = Grid.of(model.config.diffusion_attention, settings.block_length or max(width, 1))
    recorded = torch.from_numpy(entropies) if settings.record_entropies else None
    return DiffusionRollout(*map(torch.from_numpy, tensors), forwards, grid, entropies=recorded)
