"""Who attends to whom in one flat sequence of many pieces: what the backbone takes in place of an attention mask."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


def _visible(q: tuple, k: tuple):
    """Who sees whom. `q` and `k` are `(group, row, clean, block, copy)` of tokens, broadcast against each other."""
    q_group, q_row, q_clean, q_block, q_copy = q
    k_group, k_row, k_clean, k_block, k_copy = k
    context = (q_group == k_group) & ((k_row == -1) | (k_row == q_row))
    earlier = k_clean & ((k_block < q_block) | (q_clean & (k_block == q_block)))
    return context & (earlier | (~k_clean & (k_copy == q_copy)))


@dataclass
class AttentionPlan:
    r"""
    Who attends to whom in a packed sequence of `N` tokens, as segments of queries that share a list of keys.

    Args:
        sizes (`list[int]`):
            Lengths of the consecutive segments, sum `N`.
        keys (`list[list[int]]`):
            For each segment, the segments (whole, in this order) that are its keys.
        group (`torch.LongTensor` of shape `(N,)`):
            Rows of one group share the full blocks of their prompt.
        row (`torch.LongTensor` of shape `(N,)`):
            Row of the micro-batch, -1 for the shared part of a prompt.
        clean (`torch.BoolTensor` of shape `(N,)`):
            `True` for the clean sequence, `False` for a noisy copy of one of its blocks.
        block (`torch.LongTensor` of shape `(N,)`):
            Block of the token on the grid anchored at token 0 of its sequence.
        copy (`torch.LongTensor` of shape `(N,)`):
            Noisy copy the token belongs to, -1 for clean tokens.
        device (`torch.device`):
            Where the masks are put. The metadata above stays on the CPU.
    """

    sizes: list[int]
    keys: list[list[int]]
    group: torch.Tensor
    row: torch.Tensor
    clean: torch.Tensor
    block: torch.Tensor
    copy: torch.Tensor
    device: torch.device

    @property
    def _tokens(self) -> tuple[torch.Tensor, ...]:
        return self.group, self.row, self.clean, self.block, self.copy

    @cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """Per segment its boolean mask `(1, 1, q, k)`, `True` = may attend, or `None` where every key is visible."""
        tokens = [x.numpy() for x in self._tokens]
        segments = np.split(np.arange(len(self.group)), np.cumsum(self.sizes)[:-1])
        masks = []
        for queries, keys in zip(segments, self.keys, strict=True):
            keys = np.concatenate([segments[i] for i in keys])
            masks.append(_visible(tuple(x[queries, None] for x in tokens), tuple(x[None, keys] for x in tokens)))
        needed = [mask for mask in masks if not mask.all()]
        # One transfer to the device for all of them.
        flat = torch.from_numpy(np.concatenate([mask.ravel() for mask in needed] or [np.zeros(0, bool)]))
        cut = iter(flat.to(self.device).split([mask.size for mask in needed]))
        return [None if mask.all() else next(cut).view(1, 1, *mask.shape) for mask in masks]

    def dense(self) -> torch.Tensor:
        """The same visibility as one boolean mask `(1, 1, N, N)`: the reference, and the mask of eager attention."""
        tokens = self._tokens
        mask = _visible(tuple(x[:, None] for x in tokens), tuple(x[None, :] for x in tokens))
        return mask[None, None].to(self.device)

    def block_mask(self, device: torch.device | str | None = None):
        """The same visibility as a `BlockMask` for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        device = self.device if device is None else device
        tokens = tuple(x.to(device) for x in self._tokens)

        def mask_mod(batch, head, q_index, k_index):
            return _visible(tuple(x[q_index] for x in tokens), tuple(x[k_index] for x in tokens))

        length = len(self.group)
        return create_block_mask(mask_mod, None, None, length, length, device=str(device))


class WholeSequences(AttentionPlan):
    """Full attention: every segment is a sequence of its own, whose tokens all see each other."""

    masks = property(lambda self: [None] * len(self.sizes))


@dataclass
class ChunkedPlan:
    r"""
    A flat sequence that the backbone computes in chunks, one after another. In training each chunk keeps its input
    only and is computed again in the backward pass, so memory is that of one chunk, however many there are.

    Args:
        plans (`list[AttentionPlan]`):
            Plan of each chunk.
        tokens (`list[int]`):
            Tokens of each chunk, sum `N`.
        reads (`list[int]`):
            How many of `score_index`, which is in ascending order of chunks, lie in each chunk.
    """

    plans: list[AttentionPlan]
    tokens: list[int]
    reads: list[int]
