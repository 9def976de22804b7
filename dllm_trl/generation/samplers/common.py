"""What the remasking strategies share: the scores of the sampled tokens and the ranking of masked positions."""

from functools import cached_property

import torch


class TokenScores:
    r"""
    Scores of the tokens sampled at the masked positions of a batch of blocks, spread over `(B, W)`; each is computed
    only when a strategy asks for it. All of them are of softmax(logits / temperature) over the whole vocabulary, before
    any filter.

    Args:
        masked (`torch.BoolTensor` of shape `(B, W)`):
            Masked positions, `n` in all, in row-major order.
        log_probs (`torch.FloatTensor` of shape `(n,)`):
            Log-probability of the sampled token at each masked position.
        logits (`torch.FloatTensor` of shape `(n, V)`):
            Logits divided by the temperature.
        log_normalizer (`torch.FloatTensor` of shape `(n,)`):
            Their log-sum-exp.
        uniform (`torch.FloatTensor` of shape `(B, W)`):
            A uniform draw in [0, 1) per position, for the strategies that need randomness.
    """

    def __init__(self, masked, log_probs, logits, log_normalizer, uniform):
        self.masked, self.log_probs, self.logits, self.log_normalizer = masked, log_probs, logits, log_normalizer
        self.uniform = uniform

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(self.masked.shape).masked_scatter_(self.masked, values)

    @cached_property
    def confidence(self) -> torch.Tensor:
        return self._spread(self.log_probs.exp())

    @cached_property
    def entropy(self) -> torch.Tensor:
        log_probs = self.logits - self.log_normalizer[:, None]
        # 0 log 0 = 0: a processor or a checkpoint may set a logit to -inf
        return self._spread(-(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1))

    @cached_property
    def margin(self) -> torch.Tensor:
        top2 = (self.logits.topk(2, dim=-1).values - self.log_normalizer[:, None]).exp()
        return self._spread(top2[:, 0] - top2[:, 1])


def top_quota(score: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The `quota` masked positions of highest `score` in each row; of equal ones the leftmost. All `(B, W)`, `(B,)`."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.size(-1), device=order.device).expand_as(order)
    )
    return masked & (rank < quota[:, None])
