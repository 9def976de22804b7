"""What the remasking strategies share: the scores of the sampled tokens and the ranking of masked positions."""

from collections.abc import Callable
from functools import cached_property

import torch


class TokenScores:
    r"""
    Scores of the tokens sampled at the masked positions of a batch of blocks, spread over `(B, W)`; each is computed
    only when a strategy asks for it. All of them are of softmax(logits / temperature) over the whole vocabulary,
    before any filter.

    Args:
        masked (`torch.BoolTensor` of shape `(B, W)`):
            Masked positions, `n` in all, in row-major order.
        token_log_probs (`torch.FloatTensor` of shape `(n,)`):
            Log-probability of the sampled token at each masked position.
        log_probs (`torch.FloatTensor` of shape `(n, V)`):
            Log-probabilities of all tokens.
        draw (`Callable[[], torch.FloatTensor]`):
            Uniform draws in [0, 1) for the masked positions, `(n,)`, for the strategies that need randomness.
    """

    def __init__(
        self,
        masked: torch.Tensor,
        token_log_probs: torch.Tensor,
        log_probs: torch.Tensor,
        draw: Callable[[], torch.Tensor],
    ):
        self.masked, self.token_log_probs, self.log_probs, self.draw = masked, token_log_probs, log_probs, draw

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(self.masked.shape).masked_scatter_(self.masked, values)

    @cached_property
    def confidence(self) -> torch.Tensor:
        return self._spread(self.token_log_probs.exp())

    @cached_property
    def entropy(self) -> torch.Tensor:
        # 0 log 0 = 0: a checkpoint may have logits of -inf
        return self._spread(-(self.log_probs.exp() * self.log_probs).nan_to_num(0.0).sum(-1))

    @cached_property
    def margin(self) -> torch.Tensor:
        best, second = self.log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        return self._spread(best - second)

    @cached_property
    def uniform(self) -> torch.Tensor:
        return self._spread(self.draw())


def top_quota(score: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The `quota` `(B,)` masked positions of highest `score` in each row `(B, W)`; of equal ones the leftmost."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return masked & (order.argsort(dim=-1) < quota[:, None])
