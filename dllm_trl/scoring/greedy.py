"""What a model would put in place of masked tokens all at once."""

import torch
from torch import nn

from ..types import Round, Rows
from .scorer import Scorer


def complete_greedily(
    scorer: Scorer, model: nn.Module, rows: Rows, hidden: list[torch.Tensor], suppressed: list[int]
) -> list[torch.Tensor]:
    r"""
    The most likely token at every hidden position of each of `K` canvases, in one forward each; with block attention,
    where only what lies in one block of a row is filled at a time, in one for all.

    Args:
        scorer ([`Scorer`]):
            How rows are laid out.
        model (`nn.Module`):
            A diffusion language model, wrapped or not.
        rows ([`Rows`]):
            Prompts and canvases.
        hidden (`list[torch.Tensor]`, each of shape `(B, R)`):
            What is masked and filled.
        suppressed (`list[int]`):
            Ids that are never chosen, the mask token among them.

    Returns:
        `list[torch.LongTensor]`, each of shape `(B, R)`: the canvases, filled.
    """
    rounds = [Round(mask, mask) for mask in hidden]
    parts = [rounds] if rows.grid.attention == "block" else [[one] for one in rounds]
    canvases = []
    for part in parts:
        packed = scorer.pack(rows, part)
        logits = model(**packed.model_inputs()).logits[0].float()
        logits[:, suppressed] = -torch.inf
        filled = rows.canvas_ids.expand(len(part), -1, -1).clone()
        canvases += filled.index_put_(packed.index, logits.argmax(-1)).unbind(0)
    return canvases
