"""What the remasking strategies share: the scores of the sampled tokens and the ranking of masked positions."""

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property, wraps
from typing import Any

import torch


def entropy_of(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropies (nats) of distributions over the last dimension. 0 log 0 = 0: a checkpoint may have logits of -inf."""
    return -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)


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
        alg_temp (`float`, *optional*, defaults to `0.0`):
            Temperature of the ranking (Dream's `alg_temp`), 0 for none.
        committed_log_probs (`Callable[[], torch.FloatTensor]`, *optional*):
            Log-probabilities `(B, W)` of the tokens that the blocks have committed, NaN where they have none.
    """

    def __init__(
        self,
        masked: torch.Tensor,
        token_log_probs: torch.Tensor,
        log_probs: torch.Tensor,
        draw: Callable[[], torch.Tensor],
        alg_temp: float = 0.0,
        committed_log_probs: Callable[[], torch.Tensor] | None = None,
    ):
        self.alg_temp, self.committed_log_probs = alg_temp, committed_log_probs
        self.masked, self.token_log_probs, self.log_probs, self.draw = masked, token_log_probs, log_probs, draw

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(self.masked.shape).masked_scatter_(self.masked, values)

    @cached_property
    def confidence(self) -> torch.Tensor:
        return self._spread(self.token_log_probs.exp())

    @cached_property
    def committed(self) -> torch.Tensor:
        """Confidence of the tokens committed in earlier steps of the block, NaN elsewhere."""
        return self.committed_log_probs().exp()

    @cached_property
    def entropy(self) -> torch.Tensor:
        return self._spread(entropy_of(self.log_probs))

    @cached_property
    def margin(self) -> torch.Tensor:
        best, second = self.log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        return self._spread(best - second)

    def ranked(self, score: torch.Tensor) -> torch.Tensor:
        """
        `score` `(B, W)` for a choice of the best ones; with `alg_temp` under Gumbel noise, so that they are a sample
        without replacement from softmax(score / alg_temp).
        """
        if not self.alg_temp:
            return score
        return score / self.alg_temp - (-self.uniform.clamp(min=1e-12).log()).log()

    @cached_property
    def uniform(self) -> torch.Tensor:
        return self._spread(self.draw())


def top_quota(score: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The `quota` `(B,)` masked positions of highest `score` in each row `(B, W)`; of equal ones the leftmost."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return masked & (order.argsort(dim=-1) < quota[:, None])


def built(kind: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `kind` whose fields are those of `values` by their names, where these are set."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if values.get(field.name) is not None})


def checked(strategy: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A strategy of somebody's own that is held to its contract: it commits masked positions, and comes to an end."""

    @wraps(strategy)
    def sampler(scores: TokenScores, masked: torch.Tensor, quota: torch.Tensor, **kwargs) -> torch.Tensor:
        commit = strategy(scores, masked, quota, **kwargs)
        if commit.shape != masked.shape or commit.dtype != torch.bool or (commit & ~masked).any():
            raise ValueError(
                f"`remasking_strategy` must return a boolean tensor of shape {tuple(masked.shape)} that is True at "
                f"masked positions only, but returned {commit.dtype} of shape {tuple(commit.shape)}. Combine it with "
                "`masked`."
            )
        if ((quota >= masked.sum(-1)) & masked.any(-1) & ~commit.any(-1)).any():
            raise ValueError(
                "`remasking_strategy` commits nothing where the quota is all that is masked, so the block would never "
                "be full. Commit at least one token there, `top_quota(score, masked, quota)` for example."
            )
        return commit

    return sampler
