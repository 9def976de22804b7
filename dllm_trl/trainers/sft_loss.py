"""The loss of supervised fine-tuning. Tensors only."""

import torch

from ..types import Round


LOSS_NORMS = ("token", "sequence", "masked", "batch")


def sft_loss(
    nll: torch.Tensor,
    loss_weight: torch.Tensor,
    row: torch.Tensor,
    num_trained: torch.Tensor,
    loss_norm: str = "token",
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""
    The weighted negative log-likelihood of a batch.

    Args:
        nll (`torch.Tensor` of shape `(n,)`):
            Negative log-likelihoods of the scored tokens.
        loss_weight (`torch.Tensor` of shape `(n,)`):
            Their weights in the loss ([`Round.loss_weight`]).
        row (`torch.LongTensor` of shape `(n,)`):
            Their rows.
        num_trained (`torch.LongTensor` of shape `(B,)`):
            Tokens that are trained in each row, scored this time or not.
        loss_norm (`str`, *optional*, defaults to `"token"`):
            `"token"`: the sum over all trained tokens of the batch. `"sequence"`: each row's sum over its own trained
            tokens, averaged over rows. `"masked"`: the sum over all scored tokens of the batch. `"batch"`: the sum
            over the number of rows.
        num_items (`torch.Tensor` or `int`, *optional*):
            Trained tokens (scored ones for `"masked"`, rows for `"sequence"` and `"batch"`) of the whole accumulated
            batch of all processes. `None` counts those of this batch.
    """
    total = nll * loss_weight
    if loss_norm == "sequence":
        total = total / num_trained[row]
    if num_items is None:
        num_items = num_loss_items(num_trained, loss_norm, len(nll))
    return total.sum() / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def num_loss_items(num_trained: torch.Tensor, loss_norm: str, num_scored: torch.Tensor | int) -> torch.Tensor:
    """What `loss_norm` divides by: trained tokens, scored ones, or rows that have any to train."""
    if loss_norm == "masked":
        return torch.as_tensor(num_scored, device=num_trained.device)
    return num_trained.sum() if loss_norm == "token" else (num_trained > 0).sum()


def num_scored(rounds: list[Round]) -> torch.Tensor:
    """Scored tokens of all rounds."""
    return torch.stack([r.scored.sum() for r in rounds]).sum()


def loss_weights(rounds: list[Round], index: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    """Weights `(n,)` of the scored tokens at `index`, each `(n,)`: round, row and column."""
    weights = [torch.ones_like(r.scored, dtype=like.dtype) if r.loss_weight is None else r.loss_weight for r in rounds]
    return torch.stack(weights)[index].to(like.device) if rounds else torch.ones_like(like)
