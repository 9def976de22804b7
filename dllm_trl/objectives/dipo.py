"""DiPO (DiRL): TraceRL's rounds, a mean over all tokens, and more room above 1 than below."""

from dataclasses import dataclass
from typing import ClassVar

from .base import LossInputs, LossOutputs
from .option_checks import check_choices
from .ratios import clipped_surrogate
from .trace import TraceObjective


def dipo_loss(logps, old, ref, advantages, mask, num_tokens, epsilon_low, epsilon_high, beta=0.0, kl="k3"):
    """
    Sum over the tokens of `mask` `(B, R)`, divided by `num_tokens`. `logps`, `old` and `ref` (only with `beta`) are
    `(B, R)`, `advantages` `(B,)` or `(B, R)`. Differences of log-probabilities are bounded by 10 where they are
    exponents.
    """
    ratios = (logps - old).clamp(-10.0, 10.0)
    loss = -clipped_surrogate(ratios, advantages.reshape(len(logps), -1), epsilon_low, epsilon_high)
    if beta:
        difference = logps - ref
        exponential = difference.neg().clamp(-10.0, 10.0).exp() - 1 if kl == "k3" else 0.0
        loss = loss + beta * (exponential + difference)
    return (loss * mask).sum() / num_tokens


@dataclass
class DiPOObjective(TraceObjective):
    r"""
    Args:
        shrink (`int`, *optional*, defaults to `1`):
            As in [`trace_rounds`].
        clip_higher (`float`, *optional*, defaults to `0.08`):
            The ratio is clipped to `[1 - epsilon, 1 + epsilon_high + clip_higher]`.
        kl (`str`, *optional*, defaults to `"k3"`):
            Estimate of the KL term, `"k3"` or `"k1"`.
    """

    token_advantages: ClassVar[bool] = True

    clip_higher: float = 0.08
    kl: str = "k3"

    def __post_init__(self):
        check_choices(self, kl=("k1", "k3"))

    def loss(self, inputs: LossInputs) -> LossOutputs:
        logps, clip = inputs.logps, (inputs.epsilon_low, inputs.epsilon_high + self.clip_higher)
        old = logps.detach() if inputs.old_logps is None else inputs.old_logps
        ref, kl = inputs.ref_logps, (inputs.beta, self.kl)
        loss = dipo_loss(logps, old, ref, inputs.advantages, inputs.scored, inputs.num_tokens, *clip, *kl)
        ratio = (logps - old).detach().exp()
        outside = ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])) & inputs.scored
        return LossOutputs(loss, {"ratio/outside": outside.sum() / inputs.num_tokens})
