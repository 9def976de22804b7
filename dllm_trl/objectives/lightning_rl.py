"""LightningRL (arXiv 2603.13319): right answers in few forward passes, and their likelihood beside the policy loss."""

from dataclasses import dataclass

import torch

from .base import LossInputs, LossOutputs, Outcome
from .lightning_terms import kept_advantages, lightning_loss, speed_rewards, step_weights
from .option_checks import check_choices, check_counts, check_weights
from .ratios import ratio_metrics
from .trace import TraceObjective


@dataclass
class LightningRLObjective(TraceObjective):
    """The rounds of the trace, rewards of its own ([`speed_rewards`]; right is what the first reward function gives
    more than 0.5) and their advantages ([`kept_advantages`]), a KL term of kind `kl`, and `nll_weight` times the
    negative log-likelihood of right responses."""

    scale: str = "batch"
    kl: str = "k3"
    nll_weight: float = 0.1
    slack: int = 5
    least_range: float = 0.01
    normalize_correct: bool = True
    drop_all_wrong: bool = True

    def __post_init__(self):
        check_counts(self, "shrink")
        check_weights(self, "nll_weight", "slack", "least_range")
        check_choices(self, scale=("batch", "prompt_group", "prompt_group_center"), kl=("k1", "k2", "k3"))
        check_choices(self, normalize_correct=(True, False), drop_all_wrong=(True, False))

    def _group(self, outcome: Outcome) -> list[torch.Tensor]:
        facts = (outcome.rewards[:, 0] > 0.5, outcome.lengths, outcome.num_forward_passes)
        grouped = (fact.view(-1, outcome.num_generations) for fact in facts)
        options = (self.slack, self.least_range, self.normalize_correct, self.drop_all_wrong)
        rewards, correct, _, kept = speed_rewards(*grouped, outcome.limit, *options)
        return [rewards.flatten(), correct.flatten(), kept.repeat_interleave(outcome.num_generations)]

    def keeps(self, outcome: Outcome) -> torch.Tensor:
        return self._group(outcome)[2] & ~outcome.rewards[:, 0].isnan()

    def advantages(self, values: torch.Tensor, outcome: Outcome) -> torch.Tensor:
        groups = torch.arange(len(outcome.total), device=values.device) // outcome.num_generations
        return kept_advantages(self._group(outcome)[0], outcome.counted, groups, self.scale).to(values.dtype)

    def notes(self, outcome: Outcome) -> dict[str, torch.Tensor]:
        return {"weights": step_weights(self._group(outcome)[1], outcome.counted, outcome.num_trained)}

    def loss(self, inputs: LossInputs) -> LossOutputs:
        new, clip = inputs.logps, (inputs.epsilon_low, inputs.epsilon_high)
        old = new.detach() if inputs.old_logps is None else inputs.old_logps
        rows = (inputs.advantages.unsqueeze(-1), inputs.scored, inputs.lengths.clamp(min=1), inputs.notes["weights"])
        options = (clip, inputs.beta, self.kl, self.nll_weight)
        policy, kl, nll = lightning_loss(new, old, inputs.ref_logps, *rows, *options)
        metrics = {"loss/policy": policy, "loss/kl": kl, "loss/likelihood": nll}
        return LossOutputs(policy + kl + nll, metrics | ratio_metrics((new - old)[inputs.scored], *clip))
