"""Blocks that are masked each at a noise level of its own, in exact numbers of tokens."""

import torch


def block_sums(tokens: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """How many of `tokens` `(B, R)` lie in each block, `(B, M)`; `blocks` `(B, R)` are counted from 0."""
    return tokens.new_zeros((len(tokens), int(blocks.max()) + 1), dtype=torch.long).scatter_add(
        1, blocks, tokens.long()
    )


def ebpo_counts(sizes: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Tokens to mask `(G, M)` of blocks of these sizes: noise levels are even around the circle, from `start` `(G, 1)`
    on, over the blocks of a group. Those without a token are passed over."""
    exists = sizes > 0
    level = (start.double() + (exists.cumsum(1) - 1) / exists.sum(1, keepdim=True).clamp(min=1)) % 1
    return torch.minimum((level * sizes).long() + 1, sizes)


def ebpo_mask(counts: torch.Tensor, trained: torch.Tensor, blocks: torch.Tensor, uniform: torch.Tensor):
    """So many of the tokens of `trained` `(B, R)` in each block: those with the smallest `uniform`."""
    sizes = block_sums(trained, blocks)
    order = (blocks + uniform.double()).masked_fill(~trained, torch.inf).argsort(dim=1, stable=True).argsort(1)
    return trained & (order - (sizes.cumsum(1) - sizes).gather(1, blocks) < counts.gather(1, blocks))
