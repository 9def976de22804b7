"""`pack_rounds` of plain tensors."""

from dllm_trl.scoring.layout import PackedRounds, pack_rounds
from dllm_trl.types import Grid, Rows


def pack(prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds, *, block_length, **kwargs) -> PackedRounds:
    grid = Grid.of("full" if block_length is None else "block", block_length)
    return pack_rounds(Rows(prompt_ids, prompt_mask, canvas_ids, canvas_mask, grid), rounds, **kwargs)
