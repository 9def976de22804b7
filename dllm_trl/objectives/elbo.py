from dataclasses import replace

from ..types import Round


def elbo_rounds(rounds: list[Round]) -> list[Round]:
    """
    The rounds with weights: the weighted sum of log-probabilities is the ELBO per token, the mean over rounds of that
    over the tokens each scores.
    """
    counts = [len(rounds) * one.scored.sum(1, keepdim=True).clamp(min=1) for one in rounds]
    return [replace(one, loss_weight=one.scored / count) for one, count in zip(rounds, counts, strict=True)]
