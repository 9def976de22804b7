"""The critic of TraceRL: its values make advantages of rewards, and it learns from each rollout before the policy."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, get_scheduler

from ..modeling.value import (
    adapter_critic,
    check_critic_config,
    copy_critic,
    export_critic,
    load_critic,
    load_own_state,
    own_state,
)
from ..objectives import Outcome
from ..objectives.trace import TraceObjective, merged_steps
from ..types import Rows
from .advantages import Advantage, GroupEstimator, discount, rewards_on_tokens
from .gae import StepGAE, clipped_value_loss, step_gae, value_loss_weights


VALUE_STATE_NAME = "value_model.pt"
VALUE_FOLDER = "value_model"


def make_value_model(value_model: str | bool | nn.Module, trainer) -> nn.Module:
    """The critic that `value_model` stands for: `"copy"`, `"adapter"`, a checkpoint or a module."""
    policy, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    config = trainer.model.config
    if isinstance(value_model, nn.Module):
        if hasattr(value_model, "config"):
            check_critic_config(value_model.config, config, type(value_model).__name__)
        critic = value_model
    elif value_model == "adapter":
        critic = adapter_critic(policy, args.value_lora_rank)
    elif value_model in (True, "copy"):
        critic = copy_critic(policy)
    else:
        critic = load_critic(value_model, config, dtype=policy.dtype)
    if args.gradient_checkpointing and isinstance(critic, PreTrainedModel):
        # Under an adapter nothing that enters the first layer has a gradient, which the reentrant kind needs
        critic.gradient_checkpointing_enable({"use_reentrant": False})
    return critic


class ValueEstimator:
    r"""
    What each token is worth: rewards over the steps of the trace minus what the critic expected (see [`step_gae`]).
    In training the critic then learns from the same rollout, with batches and micro-batches of the policy's sizes.

    Args:
        trainer ([`TraceRLTrainer`]):
            Whose rollouts are judged.
        critic (`nn.Module`):
            Gives one logit per position.
        outcomes ([`GroupEstimator`]):
            Says what whole responses are worth and which are dropped: the rewards that the critic learns to expect.
    """

    def __init__(self, trainer, critic: nn.Module, outcomes: GroupEstimator):
        self.trainer, self.critic, self.outcomes = trainer, critic, outcomes
        args = trainer.args
        self.parameters = [parameter for parameter in critic.parameters() if parameter.requires_grad]
        self.model = trainer.accelerator.prepare_model(critic)
        self.scorer = replace(trainer.scorer, head="value")
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=args.value_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self.make_scheduler(max(args.max_steps, 1))  # until a run says how long it is

    def make_scheduler(self, policy_steps: int) -> None:
        """The schedule of learning rates for a run of `policy_steps` optimizer steps of the policy."""
        args = self.trainer.args
        micro_batches = args.steps_per_generation * self.trainer.num_iterations
        rollouts = math.ceil(policy_steps * args.gradient_accumulation_steps / micro_batches)
        updates = math.ceil(rollouts / args.value_update_every) * args.value_epochs * self._updates_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = args.value_learning_rate
        self.scheduler = get_scheduler(
            args.value_lr_scheduler_type, self.optimizer, args.value_lr_warmup_steps, num_training_steps=updates
        )

    @property
    def _updates_per_epoch(self) -> int:
        args = self.trainer.args
        return max(args.steps_per_generation // args.gradient_accumulation_steps, 1)

    def __call__(self, outcome: Outcome) -> Advantage:
        trainer, args, rows = self.trainer, self.trainer.args, outcome.rows
        training = trainer.model.training
        worth = self.outcomes.responses(outcome)
        if training:  # evaluations drop nothing
            rows = replace(rows, trained=rows.trained & worth.kept[outcome.mine].unsqueeze(1))
        outcome.values = values = self._old_values(rows)
        steps = merged_steps(rows, trainer.objective.rounds(rows))
        rewards = rewards_on_tokens(worth.values, outcome, steps)
        discounts = (discount(args.gamma, outcome), args.gae_lambda)
        gae = step_gae(steps, rows.trained, rewards, values, *discounts)
        without = step_gae(steps, rows.trained, rewards, torch.zeros_like(values), *discounts)
        self._note(rows.trained, gae, values, without.advantages)
        rollout = trainer._step // (args.steps_per_generation * trainer.num_iterations)
        if training and rollout % args.value_update_every == 0:
            for _ in range(args.value_epochs):
                for first in range(self._updates_per_epoch):
                    mine = slice(first, None, self._updates_per_epoch)
                    self._update(rows[mine], values[mine], gae.returns[mine])
        return Advantage(gae.advantages, worth.kept)

    def state_dict(self) -> dict[str, dict]:
        """What a checkpoint holds of the critic."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        return {"model": own_state(self.critic)} | {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Back from [`ValueEstimator.state_dict`]."""
        load_own_state(self.critic, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    # --------------------------------------------------------------------------------------------------------- values

    def _micro_batches(self, rows: Rows) -> list[slice]:
        args = self.trainer.args
        training = self.trainer.model.training
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        return [slice(start, start + size) for start in range(0, len(rows), size)]

    def _values(self, rows: Rows) -> torch.Tensor:
        """Values `(B, R)`, each read where its token is scored, 0 elsewhere."""
        with self.trainer.accelerator.autocast():
            return self.scorer(self.model, rows, self.trainer.objective.rounds(rows)).mean("values")

    def _old_values(self, rows: Rows) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self._values(rows[part]) for part in self._micro_batches(rows)])

    # --------------------------------------------------------------------------------------------------------- update

    def _update(self, rows: Rows, old_values: torch.Tensor, returns: torch.Tensor) -> None:
        """One optimizer step on `rows`: the mean over those of all processes, a micro-batch at a time."""
        trainer, args, accelerator = self.trainer, self.trainer.args, self.trainer.accelerator
        weights = value_loss_weights(rows.trained, args.value_loss_norm, trainer.max_completion_length)
        counted = rows.trained if args.value_loss_norm == "token" else rows.trained.any(1)
        count = accelerator.reduce(counted.sum(), "sum").item()
        if count == 0:
            return
        self.model.train()
        total, parts = 0.0, self._micro_batches(rows)
        for part in parts:
            last = part is parts[-1]
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses = clipped_value_loss(self._values(rows[part]), old_values[part], returns[part], args.value_clip)
                loss = (losses * weights[part]).sum() / count
                # Processes average their gradients
                (loss * accelerator.num_processes).backward()
            total += loss.detach()
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        trainer._note("value/learning_rate", self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        trainer._note("value/loss", accelerator.reduce(total, "sum").item())

    def _note(self, trained: torch.Tensor, gae: StepGAE, values: torch.Tensor, without: torch.Tensor) -> None:
        """Variances over all trained tokens, of returns and advantages, with and without what the critic expected."""
        columns = [gae.returns, gae.returns - values, gae.advantages, without]
        numbers = torch.stack([column[trained].double() for column in columns])
        sums = torch.stack([trained.sum().expand(len(columns)), numbers.sum(1), numbers.square().sum(1)])
        counts, sums, squares = self.trainer.accelerator.reduce(sums, "sum")
        count, note = counts[0].item(), self.trainer._note
        if count == 0:
            return
        returns, unexpected, advantages, without = (squares / count - (sums / count).square()).clamp(min=0).tolist()
        note("value/advantage_variance", advantages, count)
        note("value/advantage_variance_without", without, count)
        if returns > 0:
            note("value/explained_variance", 1 - unexpected / returns, count)


class _Warmup(TrainerCallback):
    """The policy stands still for its first `value_warmup_updates` steps: without gradients its optimizer skips it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step < args.value_warmup_updates:
            model.zero_grad(set_to_none=True)


class ValueModelMixin:
    """
    For a [`DiffusionGRPOTrainer`]: has a critic, if its config or its caller says so, which is part of each checkpoint
    and is exported beside the policy. Mixed in before the trainer's class.
    """

    value_model: nn.Module | None = None

    def _add_value_model(self, value_model: str | bool | nn.Module) -> None:
        check_value_model(self)
        self.value_model = make_value_model(value_model, self)
        self.estimator = ValueEstimator(self, self.value_model, self.estimator)
        if self.args.value_warmup_updates > 0:
            self.add_callback(_Warmup())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.value_model is not None:
            self.estimator.make_scheduler(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _required_files(self) -> list[tuple[str, ...]]:
        own = [] if self.value_model is None else [(VALUE_STATE_NAME,)]
        return [*super()._required_files(), *own]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.value_model is not None and self.args.should_save:
            torch.save(self.estimator.state_dict(), Path(output_dir) / VALUE_STATE_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.value_model is not None and checkpoint is not None:
            state = torch.load(Path(checkpoint) / VALUE_STATE_NAME, map_location="cpu", weights_only=True)
            self.estimator.load_state_dict(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        # A checkpoint holds the critic in a form of its own, with its optimizer
        if self.value_model is not None and not _internal_call and self.args.should_save:
            export_critic(self.value_model, Path(output_dir or self.args.output_dir) / VALUE_FOLDER)


def check_value_model(trainer) -> None:
    """Raises if a critic does not go with what else the trainer was told."""
    args, objective = trainer.args, trainer.objective
    if not isinstance(objective, TraceObjective):
        raise ValueError(
            f"`value_model` judges the steps of a trace, but `objective` is a `{type(objective).__name__}`, whose "
            "rounds are no steps. Leave `objective` at its default, or `value_model` at `None`."
        )
    if not isinstance(trainer.estimator, GroupEstimator):
        raise ValueError(
            "`value_model` brings an estimator of its own. Pass either `value_model` or `estimator`, not both."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "`value_model` is not supported with FSDP or DeepSpeed, which take one model. Train with processes that "
            'hold whole models (DDP), with LoRA and `value_model="adapter"` if memory is short.'
        )
    if args.fp16:
        raise ValueError("`value_model` does not work with `fp16=True`: the loss of a critic is not scaled. Use bf16.")
    if getattr(trainer.model, "is_quantized", False) or getattr(trainer.model, "is_loaded_in_4bit", False):
        raise ValueError("`value_model` needs a policy whose weights are not quantized. Load it without quantization.")
