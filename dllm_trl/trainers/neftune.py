"""NEFTune's noise on the embeddings, of sequences of which a forward pass holds several copies."""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from ..modeling.plans import ChunkedPlan
from ..scoring.layout import PackedRounds
from ..types import Rows


def _rows(packed: PackedRounds) -> torch.Tensor:
    """The row that each packed token belongs to, `(N,)`. Prompts must not be shared."""
    if isinstance(packed.plan, ChunkedPlan):
        sequence = (packed.position_ids[0] == 0).cumsum(0) - 1
        rows = torch.stack(packed.index[:2]).unique_consecutive(dim=1)[1]
        return F.pad(rows, (0, int(sequence[-1]) + 1 - len(rows)))[sequence]  # some of one token nobody reads
    group, row = packed.plan.group, packed.plan.row
    row_of = torch.zeros(int(group.max()) + 1, dtype=torch.long)
    row_of[group[row >= 0]] = row[row >= 0]  # the full blocks of a prompt have none
    return row_of[group].to(packed.input_ids.device)


def draw_noise(packed: PackedRounds, rows: Rows, alpha: float, hidden_size: int, *seeds: int) -> torch.Tensor:
    r"""
    Uniform noise of size `alpha / sqrt(length * hidden_size)`, where the length is the sequence's own. All copies of a
    token have the same; it is a function of the seeds and of what the row holds, whatever else is in the batch.

    Args:
        packed ([`PackedRounds`]):
            The rows, packed with `share_prompts=False`.
        rows ([`Rows`]):
            Prompts and canvases.
        alpha (`float`):
            `neftune_noise_alpha`.
        hidden_size (`int`):
            Width `H` of the embeddings.
        *seeds (`int`):
            Of the run and the step.

    Returns:
        `torch.FloatTensor` of shape `(1, N, H)`: To be added to the embeddings.
    """
    device = packed.input_ids.device
    ids = torch.cat([rows.prompt_ids, rows.canvas_ids], dim=1).cpu()
    real = torch.cat([rows.prompt_mask, rows.canvas_mask], dim=1).bool().cpu()
    noise = torch.zeros(len(ids), ids.size(1), hidden_size, device=device)
    for out, row, exists in zip(noise, ids, real, strict=True):
        tokens = row[exists]
        seed = np.random.SeedSequence([*seeds, zlib.crc32(tokens.numpy().tobytes())]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(seed >> 1))
        size = alpha / math.sqrt(max(len(tokens), 1) * hidden_size)
        out[: len(tokens)].uniform_(-size, size, generator=generator)
    return noise[_rows(packed), packed.position_ids[0]][None]
