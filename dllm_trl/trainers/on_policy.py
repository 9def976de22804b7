"""What the trainer scores is what the rollout saw: how far apart their log-probabilities may be."""

import torch
from accelerate.logging import get_logger
from torch import nn

from ..generation.processors import is_filtered


logger = get_logger(__name__)

# Largest difference that is rounding: of any token in float32, on average in half precision.
FULL_PRECISION, HALF_PRECISION = 1e-3, 0.05


def judge_difference(mean: float, maximum: float, full_precision: bool) -> str | None:
    """
    Args:
        mean, maximum (`float`):
            Of the absolute differences of log-probabilities (nats) of the same tokens under the same weights.
        full_precision (`bool`):
            Whether everything was computed in float32.

    Returns:
        `str` or `None`: What is to be said of a difference that may be more than half precision's rounding.

    Raises:
        RuntimeError: float32 differs by more than rounding.
    """
    figures = f"mean |difference| {mean:.3g}, max {maximum:.3g}"
    if full_precision and not maximum <= FULL_PRECISION:
        raise RuntimeError(
            f"Rollout and trainer disagree on log-probabilities under the same weights ({figures}; in float32 at most "
            "1e-3 is rounding): the policy would be trained on contexts it never saw. Were the weights, the attention "
            "implementation or the forward changed between rollout and loss? `on_policy_check='off'` skips this check."
        )
    if not full_precision and not mean <= HALF_PRECISION:
        return (
            f"Rollout and trainer disagree on log-probabilities under the same weights ({figures}; in half precision "
            "a mean of at most 0.05 is rounding). Train in float32 to see whether it is rounding, or set "
            "`on_policy_check='off'` to skip this check."
        )
    return None


def decodes_as_wanted(trainer) -> bool:
    """Whether rollouts are decoded as the objective asks ([`Objective.decoding`]). Says what is not, where somebody
    asked for something else: that is no mistake, but the objective then scores contexts the rollout never saw."""
    wanted = trainer.objective.decoding(trainer.block_length)
    other = {name: getattr(trainer.generation_config, name) for name in wanted}
    if other == wanted:
        return True
    logger.warning(
        f"`{type(trainer.objective).__name__}` is made for rollouts with {wanted}, but `args` say {other}: tokens are "
        "scored in contexts that the rollout did not see. Leave these options unset."
    )
    return False


class OnPolicyCheck:
    """
    Compares the log-probabilities that a rollout recorded with those the trainer computes from the same weights.

    `recorded` says whether the two are of the same kind at all: the objective replays the rollout, and sampling had
    no filters and no guidance. `comparable` says whether they must be equal: a rollout with an approximate cache saw
    other numbers, whose difference is logged, and that is all.
    """

    def __init__(self, trainer):
        config = trainer.generation_config
        replays = decodes_as_wanted(trainer) and trainer.objective.replays_rollout
        self.recorded = replays and config.do_sample and not (is_filtered(config) or config.cfg_scale)
        self.comparable = self.recorded and config.cache in (None, "none", "exact") and trainer.rollouts.exact
        self.mode = trainer.args.on_policy_check
        self.drops_out = any(
            (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0)
            for module in trainer.model.modules()
        )
        self.full_precision = (
            all(p.dtype == torch.float32 for p in trainer.model.parameters())
            and trainer.accelerator.mixed_precision == "no"
            and torch.get_float32_matmul_precision() == "highest"
        )
        if trainer.args.use_rollout_logprobs and not self.comparable:
            raise ValueError(
                "`use_rollout_logprobs=True` needs an objective that replays the rollout (`shrink=1`; decoding as it "
                "asks for) and sampling without `top_k`, `top_p`, `min_p`, `repetition_penalty` (or what else of the "
                "kind `generation_kwargs` has), `cfg_scale` and approximate `cache`: otherwise the trainer computes "
                "other numbers."
            )

    def __call__(self, trainer, logps: torch.Tensor, recorded: torch.Tensor, trained: torch.Tensor) -> None:
        """Judges `logps` against `recorded`, both `(B, R)`, at the tokens of `trained`."""
        if self.mode == "off" or (trainer.model.training and self.drops_out):
            return
        difference = ((logps.detach() - recorded).abs() * trained).float()
        sums = torch.stack([difference.sum(), trained.sum().float()])
        total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        mean, maximum = total / max(count, 1), trainer.accelerator.gather(difference.max()).max().item()
        trainer._note("sampling/sampling_logp_difference/mean", mean, count)
        trainer._note("sampling/sampling_logp_difference/max", maximum)
        if not self.comparable:
            return
        warning = judge_difference(mean, maximum, self.full_precision)
        if warning and self.mode == "error":
            raise RuntimeError(warning)
        if warning:
            logger.warning(warning)
