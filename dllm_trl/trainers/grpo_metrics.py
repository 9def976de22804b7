"""What a rollout comes to: rows that count, rewards, advantages; TRL's metrics of it and of a loss, and ours."""

from collections import deque
from dataclasses import dataclass

import torch
from transformers.trainer_utils import has_length

from ..objectives import Objective, Outcome
from ..types import DiffusionRollout, Rows
from .advantages import Advantage
from .metrics import EXTREMES, RatioMetricsMixin
from .process_rewards import chunk_z_scores, place_lists


# Loss types that average over responses. The others are normalised by trained tokens.
ROW_NORMALISED = ("grpo", "sapo", "dr_grpo", "luspo")


@dataclass
class Generation:
    """
    A rollout while TRL turns it into rewards and advantages: the one thing that methods leave for each other, because
    TRL hands on ids and text only.

    Args:
        first_row (`int`): Place of its first row in the whole run.
        rollout ([`DiffusionRollout`], *optional*): This process's responses.
        counted (`torch.BoolTensor` of shape `(B,)`, *optional*): Rows that are no repeats, which fill up evaluations.
        rewards (`torch.FloatTensor` of shape `(N, F)`, *optional*): Rewards of all processes, means in place of lists.
        numbers (`torch.FloatTensor` of shape `(N, F)`, *optional*): The same with NaN in place of lists.
        lists (`torch.FloatTensor` of shape `(N, K)`, *optional*): Weighted sums of those that are lists, if there are.
        completed (`torch.FloatTensor` of shape `(N, K)`, *optional*): See [`Outcome`].
    """

    first_row: int = 0
    rollout: DiffusionRollout | None = None
    counted: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    lists: torch.Tensor | None = None
    completed: torch.Tensor | None = None


class GRPOMetricsMixin(RatioMetricsMixin):
    """For [`DiffusionGRPOTrainer`]: knows which of TRL's metrics is a mean of what."""

    _eval_rows = 0  # rows of the running evaluation that were decoded so far
    _eval_size = None  # how many it has, where that is known; what comes after them are repeats

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_rows = 0  # every evaluation draws the same numbers
        self._eval_size = len(dataloader.dataset) * self.num_generations_eval if has_length(dataloader) else None
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _first_row(self, rows: int) -> int:
        """
        Place of this process's next row in the whole run. A row draws from it and a seed: no matter how many processes
        share the work, in what state torch's generators are, or whether the run was resumed.
        """
        if self._mode == "train":
            generation = self._step // (self.args.steps_per_generation * self.num_iterations)
            first_row = generation * self.args.generation_batch_size
        else:
            first_row = self._eval_rows
            self._eval_rows += rows * self.accelerator.num_processes
        return first_row + self.accelerator.process_index * rows

    def _total_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Weighted sums `(N,)` of `rewards` `(N, F)`; NaN where no function gave one."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return total.masked_fill(rewards.isnan().all(1), torch.nan)

    def _record_rollout(self, generation: Generation, appended: dict[str, list[float]]) -> None:
        """TRL's metrics of a generation, and ours, over the rows that are no repeats."""
        rollout, counted = generation.rollout, generation.counted
        lengths = rollout.completion_mask.sum(1)
        last = rollout.completion_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = torch.isin(last, torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device))
        terminated = lengths.float().masked_fill(~ended, torch.nan)
        rows = {"completions/clipped_ratio": ~ended, "decode/forward_passes": rollout.num_forward_passes}
        rows |= {f"completions/{kind}_length": lengths for kind in ("mean", "min", "max")}
        rows |= {f"completions/{kind}_terminated_length": terminated for kind in ("mean", "min", "max")}
        rows |= self._reward_metrics(generation.rewards, self._mine(len(rollout)))
        self._note_rows(rows, counted)
        committed = ((rollout.step_map >= 0) & counted.unsqueeze(1)).sum()
        forwards = (rollout.num_forward_passes * counted).sum()
        self._note_ratios({"decode/tokens_per_forward": (committed, forwards)})
        self._metrics[self._mode]["num_tokens"] = appended.pop("num_tokens")
        num_rows = self.accelerator.reduce(counted.sum(), "sum").item()
        for name in appended.keys() - rows.keys():  # logged by reward functions
            for value in appended[name]:
                self._note(name, value, num_rows)

    def _mine(self, rows: int) -> slice:
        """This process's among the gathered rows."""
        return slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)

    def _reward_metrics(self, rewards: torch.Tensor, mine: slice) -> dict[str, torch.Tensor]:
        siblings = self.num_generations if self._mode == "train" else self.num_generations_eval
        total = self._total_rewards(rewards)
        groups = total.view(-1, siblings)
        equal = groups.nan_to_num(torch.inf).amin(1) == groups.nan_to_num(-torch.inf).amax(1)
        rows = {"reward": total, "reward_std": total, "frac_reward_zero_std": equal.repeat_interleave(siblings)}
        for name, values in zip(self.reward_func_names, rewards.unbind(1), strict=True):
            rows |= {f"rewards/{name}/mean": values, f"rewards/{name}/std": values}
        return {name: values[mine] for name, values in rows.items()}

    def _outcome(self, generation: Generation, advantages: torch.Tensor, rows: Rows) -> Outcome:
        """What is known of the rollout of all processes, with the advantages `(B,)` that TRL computed."""
        siblings = self.num_generations if self._mode == "train" else self.num_generations_eval
        total, mine, rollout = self._total_rewards(generation.rewards), self._mine(len(rows)), generation.rollout
        facts = rows.trained.sum(1), rollout.completion_mask.sum(1), rollout.num_forward_passes
        num_trained, lengths, forwards = self.accelerator.gather(torch.stack(facts, dim=1)).unbind(1)
        known = {"num_trained": num_trained, "lengths": lengths, "num_forward_passes": forwards}
        known |= {"counted": num_trained > 0, "limit": self.max_completion_length, "completed": generation.completed}
        gathered = self.accelerator.gather(advantages)
        outcome = Outcome(generation.rewards, total, gathered, siblings, mine, rows, **known)
        if generation.lists is not None:
            scores = chunk_z_scores(generation.lists, siblings)[mine]
            chunks = (self.args.reward_chunk_length, self.block_length)
            completed = rollout.completion_mask.bool()
            outcome.token_rewards = place_lists(scores, rollout.step_map, completed, *chunks)
            outcome.numbers = self._total_rewards(generation.numbers)
        return outcome

    def _estimate(self, generation: Generation, advantages: torch.Tensor, rows: Rows) -> Advantage:
        """What the responses are worth, logged; groups are dropped in training only."""
        training, rewards = self._mode == "train", generation.rewards
        outcome = self._outcome(generation, advantages, rows)
        advantage = self.estimator(outcome)
        if not training:
            advantage.kept = torch.ones_like(advantage.kept)
        else:
            advantage.kept &= self.objective.keeps(outcome)
            if self.args.accuracy_range is not None or type(self.objective).keeps is not Objective.keeps:
                self._note("frac_groups_dropped", 1 - advantage.kept.float().mean().item(), len(advantage.kept))
        outcome.counted = outcome.counted & advantage.kept
        if type(self.objective).loss is not Objective.loss and not self.objective.token_advantages:
            advantage.values = self._response_advantages(advantage, rows)
        advantage.values = self.objective.advantages(advantage.values, outcome)
        advantage.notes = self.objective.notes(outcome)
        if training:
            self._watch_signal(rewards, advantage)
        self._log_again(self._logs["advantages"], self._response_advantages(advantage, rows))
        if generation.lists is not None:
            for name, values in zip(self.reward_func_names, rewards.unbind(1), strict=True):
                self._log_again(self._logs["rewards"][name], values)
        return advantage

    def _response_advantages(self, advantage: Advantage, rows: Rows) -> torch.Tensor:
        """Advantages `(N,)` of all responses; of those of tokens, the mean over the trained ones."""
        if advantage.values.dim() == 1:
            return advantage.values
        means = (advantage.values * rows.trained).sum(1) / rows.trained.sum(1).clamp(min=1)
        return self.accelerator.gather(means)

    def _log_again(self, logged: deque, values: torch.Tensor) -> None:
        """Puts a rollout's values in TRL's table of completions in place of those that it has put there."""
        earlier = list(logged)[: max(len(logged) - len(values), 0)]
        logged.clear()
        logged.extend(earlier + values.tolist())

    def _record_loss(
        self, appended: dict[str, list[float]], inputs: dict, trained: torch.Tensor, loss: torch.Tensor, own: bool
    ) -> None:
        """TRL's metrics of a micro-batch, each with the tokens or rows it is a mean of; `own`: not a loss of TRL's."""
        counted = inputs.get("counted", torch.ones_like(trained[:, 0])).sum()
        sizes = torch.stack([trained.sum(), counted, torch.ones_like(trained[:, 0]).sum()])
        tokens, num_counted, rows = self.accelerator.reduce(sizes, "sum").tolist()
        by_row = own or self.loss_type in ROW_NORMALISED
        if self._mode == "eval":
            if by_row:
                total = loss * len(trained)
            elif self.loss_type == "bnpo":
                total = loss * sizes[0]
            else:
                total = loss * inputs["num_items_in_batch"] / self.accelerator.num_processes
            ratio = (total, counted if by_row else sizes[0])
            self._note_ratios({name: ratio for name in ("loss", "policy_loss") if name in appended or name == "loss"})
        elif "policy_loss" in appended:
            # Those that are normalised by the tokens of the whole step give each micro-batch's share of it
            whole = by_row or self.loss_type == "bnpo"
            share = 1 if whole else self.current_gradient_accumulation_steps
            self._note("policy_loss", appended["policy_loss"][0] * share)
        appended.pop("policy_loss", None)
        for name in {"aux_loss", "entropy_coef"} & appended.keys():  # no means over tokens
            self._metrics[self._mode][name] += appended.pop(name)
        for name, (value,) in appended.items():
            if name in EXTREMES:
                self._note(name, value)
            elif name == "vespo/phi_seq_mean" or (
                self.importance_sampling_level == "sequence" and name.startswith(("clip_ratio", "cispo"))
            ):
                self._note(name, value, num_counted)
            elif tokens:  # TRL takes a canvas that is one token wide for values of rows
                self._note(name, value * (rows / tokens if trained.size(1) == 1 else 1), tokens)
