import hashlib
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context, profiling_decorator
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .._compat import use_small_logprob_tiles
from ..generation import DiffusionGenerationConfig, generate_rollouts
from ..generation.processors import OFF, is_filtered
from ..generation.sharded import whole_weights
from .advantages import in_accuracy_range, is_overlong, population_z_score
from .checks import (
    check_attention,
    check_columns,
    check_enough_prompts,
    check_eos,
    check_model,
    check_options,
    check_peft,
    check_precision,
    check_prompts,
    check_reward_columns,
    check_router_loss,
    check_sharding,
    fill_task_type,
    find_mask_token,
    guard_reward,
)
from .completion_tables import CompletionTablesMixin
from .diffusion_grpo_config import DiffusionGRPOConfig
from .metrics import EXTREMES, RatioMetricsMixin, new_notes
from .model_card import DiffusionModelCardMixin
from .objectives import Objective, TraceObjective, make_objective
from .on_policy import judge_difference
from .published_checkpoints import PublishedCheckpointMixin
from .reference_model import copied_reference
from .rollout_resume import RolloutResumeMixin
from .round_packing import pack_batch
from .unread_options import UNREAD_IN_RL, check_unread


logger = get_logger(__name__)

# Loss types that average over responses. The others are normalised by scored tokens.
_ROW_NORMALISED = ("grpo", "sapo", "dr_grpo", "luspo")
# Largest difference of log-probabilities to the old policy: exp(10) is far outside of every clipping range.
_MAX_LOG_RATIO = 10.0
_CONTEXT = ("canvas_ids", "canvas_mask", "step_map", "scored")


class DiffusionGRPOTrainer(
    PublishedCheckpointMixin,
    RolloutResumeMixin,
    CompletionTablesMixin,
    DiffusionModelCardMixin,
    RatioMetricsMixin,
    GRPOTrainer,
):
    r"""
    [`~trl.GRPOTrainer`] for block diffusion language models: the rollout comes from the decoding engine of this
    package, and log-probabilities are those of the tokens in the contexts ("rounds") that an objective names.
    Everything else, from rewards to losses to logging, is TRL's. Base class of the trainers here, and for objectives
    of your own.

    Example:

    ```python
    from datasets import load_dataset
    from dllm_trl import DiffusionGRPOTrainer
    from dllm_trl.rewards import math_reward

    trainer = DiffusionGRPOTrainer(
        model="JetLM/SDAR-1.7B-Chat",
        reward_funcs=math_reward,
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        objective="trace",
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trl.GRPOTrainer`]. `args` is a [`DiffusionGRPOConfig`]; the model is a diffusion language model.
        tools, rollout_func, environment_factory:
            Not supported, must stay `None`.
        objective (`str` or [`Objective`], *optional*):
            Which rounds are scored: a name from `dllm_trl.trainers.objectives.OBJECTIVES`, or a callable. By default
            the rollout is replayed.
    """

    _tag_names = ["trl", "dllm-trl", "grpo"]
    _name = "Diffusion GRPO"
    config_class = DiffusionGRPOConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,  # noqa: F821
        args: DiffusionGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,  # noqa: F821
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        objective: str | Objective | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_name.split('/')[-1]}-{self._name.replace(' ', '-')}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a `{self.config_class.__name__}`, but is a `{type(args).__name__}`.")
        not_supported = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        check_options(type(self).__name__, args, reward_funcs, not_supported)
        check_unread(type(self).__name__, args, UNREAD_IN_RL)
        check_precision(args)
        check_peft(model, peft_config)
        check_eos(processing_class)
        fill_task_type(model, peft_config)
        config = check_model(model, args.model_init_kwargs, args.trust_remote_code)
        use_cache = config.use_cache
        check_router_loss(config, args)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(name, dataset)
            check_reward_columns(reward_funcs, name, dataset)
        self.objective = self._default_objective(args) if objective is None else make_objective(objective)

        # With `kl_target="old"`, TRL must not load a reference model: it does so whenever `beta` is not 0
        beta = args.beta
        if args.kl_target == "old":
            args.beta = 0.0
        try:
            with copied_reference(model):
                super().__init__(
                    model=model,
                    reward_funcs=reward_funcs,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    reward_processing_classes=reward_processing_classes,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    quantization_config=quantization_config,
                    peft_config=peft_config,
                )
        finally:
            args.beta = beta
        self.beta = beta
        check_sharding(type(self).__name__, self._dist.fsdp_version)
        use_small_logprob_tiles(self.accelerator.device.type)
        if self.scale_rewards == "population":
            self.scale_rewards = "none"  # TRL centres the rewards, `_set_advantages` does the rest

        config = self.model.config
        config.use_cache = use_cache  # `Trainer` switches it off, and the checkpoints would say so
        check_attention(config, args, self.objective)
        check_enough_prompts(self.train_dataset, args)
        # Full attention: the rollout's blocks, which training does not know. By default the whole response is one
        self.block_length = args.block_length or config.block_size or self.max_completion_length
        self._grid = self.block_length if config.diffusion_attention == "block" else None
        self.mask_token_id = find_mask_token(config, self._tokenizer)
        self.generation_config = self._make_generation_config()
        limit = config.max_position_embeddings - self.max_completion_length
        if limit < 1:
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` fills the model's context of "
                f"{config.max_position_embeddings} tokens. Lower it."
            )
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if dataset is not None:
                check_prompts(name, dataset, lambda prompts: self._tokenize_prompts(prompts)[0], limit)
        self.reward_funcs = [
            function if isinstance(function, nn.Module) else guard_reward(name, function)
            for name, function in zip(self.reward_func_names, self.reward_funcs, strict=True)
        ]

        # Rollout and trainer log-probabilities are the same numbers under these conditions only
        config, plain = self.generation_config, not getattr(self.objective, "replays_rollout", False)
        self._recorded = not (plain or is_filtered(config) or config.cfg_scale) and config.do_sample
        # A rollout with an approximate cache saw other numbers: the difference is logged, and that is all
        self._comparable = self._recorded and config.cache in (None, "none", "exact")
        if args.use_rollout_logprobs and not self._comparable:
            raise ValueError(
                "`use_rollout_logprobs=True` needs an objective that replays the rollout (`shrink=1`) and sampling "
                "without `top_k`, `top_p`, `min_p`, `repetition_penalty` (or what else `generation_kwargs` has of the "
                "kind), `cfg_scale` and approximate `cache`: the trainer computes other numbers otherwise."
            )
        self._drops_out = any(
            (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0)
            for module in self.model.modules()
        )
        self._full_precision = (
            all(p.dtype == torch.float32 for p in self.model.parameters())
            and self.accelerator.mixed_precision == "no"
            and torch.get_float32_matmul_precision() == "highest"
        )

        self._notes = new_notes()
        self._eval_rows = 0  # rows of the running evaluation that were decoded so far
        self._eval_size = None  # how many it has, where that is known; what comes after them are repeats
        self._counted = None  # `(rows,)`: which rows of the generation in progress are no repeats
        self._policy_step = None  # optimizer step of the weights that made the buffered rollout
        self._rollout = None  # the rollout of the generation in progress
        self._rewards = None  # its rewards, gathered
        self._context = None  # what the log-probability method needs beside TRL's arguments
        self._expects_old = False  # the next log-probabilities TRL asks for are the old ones
        self._scores = None  # result of the log-probability method that TRL's loss will ask for
        self._batches_without_signal = 0

    def _default_objective(self, args: DiffusionGRPOConfig) -> Objective:
        return TraceObjective()

    def _make_generation_config(self) -> DiffusionGenerationConfig:
        """All of sampling comes from the trainer's config, all else from there or from the checkpoint."""
        extra = dict(self.args.generation_kwargs or {})
        # Rows of the embedding beyond the tokenizer are padding and decode to nothing
        padding = range(len(self._tokenizer), self.model.config.vocab_size)
        never = self.model.config.suppressed_token_ids
        suppressed = {*padding, *never, *(extra.pop("suppress_tokens", None) or [])}
        values = OFF | {
            "max_new_tokens": self.max_completion_length,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "pad_token_id": self._tokenizer.pad_token_id,
            "bos_token_id": self._tokenizer.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "suppress_tokens": sorted(suppressed) or None,
            "mask_token_id": self.mask_token_id,
            "block_length": self.block_length,
            "denoising_steps": self.args.denoising_steps or min(self.block_length, self.max_completion_length),
            "remasking_strategy": self.args.remasking_strategy,
            "confidence_threshold": self.args.confidence_threshold,
            "cache": self.args.cache,
        }
        config = DiffusionGenerationConfig(**(values | extra))
        config, _ = self._base_model(self.model)._resolve_generation_config(config)
        return config

    @staticmethod
    def _base_model(model: nn.Module) -> PreTrainedModel:
        return model.get_base_model() if is_peft_model(model) else model

    # ------------------------------------------------------------------------------------------------------- rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        mode = "train" if self.model.training else "eval"
        if max(max(ids, default=0) for ids in prompt_ids) >= self.model.config.vocab_size:
            raise ValueError(
                f"`processing_class` gives token ids beyond the model's vocabulary of {self.model.config.vocab_size}: "
                "it is not the tokenizer of this model."
            )
        # A row draws from a seed and its place in the whole run: no matter how many processes share the work, in what
        # state torch's generators are, or whether the run was resumed.
        if mode == "train":
            generation = self._step // (self.args.steps_per_generation * self.num_iterations)
            first_row = generation * self.args.generation_batch_size
            self._policy_step = self.state.global_step
        else:
            first_row = self._eval_rows
            self._eval_rows += len(prompt_ids) * self.accelerator.num_processes
        first_row += self.accelerator.process_index * len(prompt_ids)
        rows = torch.arange(first_row, first_row + len(prompt_ids), device=self.accelerator.device)
        known = mode == "eval" and self._eval_size is not None
        self._counted = rows < self._eval_size if known else torch.ones_like(rows, dtype=torch.bool)
        given = (self.args.generation_kwargs or {}).get("seed")
        seed = f"{self.args.seed if given is None else given} {mode}"
        seed = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")

        with (
            profiling_context(self, "generate_rollouts"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            torch.no_grad(),
            whole_weights(unwrapped),
            self._evaluating(unwrapped),
            self.accelerator.autocast(),
        ):
            rollout = generate_rollouts(
                self._base_model(unwrapped),
                prompt_ids,
                self.generation_config,
                num_slots=self.args.num_slots,
                seed=seed,
                index_offset=first_row,
                show_progress=self.is_world_process_zero() and not self.args.disable_tqdm,
                tokenizer=self._tokenizer,
            )
        rollout = rollout.to(self.accelerator.device)

        completed = rollout.completion_mask.bool()
        after = (rollout.step_map >= 0) & ~completed
        pads = rollout.step_map.size(1) if self.args.num_scored_pads is None else self.args.num_scored_pads
        self._rollout = rollout
        self._context = {
            "canvas_ids": rollout.canvas_ids,
            "canvas_mask": rollout.canvas_mask,
            "step_map": rollout.step_map,
            "scored": (completed | (after & (after.cumsum(1) <= pads))) & self._counted.unsqueeze(1),
        }
        generate_every = self.args.steps_per_generation * self.num_iterations
        self._expects_old = self.args.gradient_accumulation_steps % generate_every != 0
        ids = zip(rollout.completion_ids.tolist(), completed.sum(1).tolist(), strict=True)
        return [row[:length] for row, length in ids], None

    @staticmethod
    @contextmanager
    def _evaluating(model: nn.Module):
        """Decodes without dropout. TRL tells training from evaluation by `model.training`, so that is put back."""
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.overlong_slack is not None:
            device = self.accelerator.device
            lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=device)
            ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids_list], device=device)
            overlong = is_overlong(lengths, ended, self.max_completion_length, self.args.overlong_slack)
            self._note_rows({"completions/overlong_ratio": overlong}, self._counted)
            overlong = self.accelerator.gather(overlong)
            rewards = torch.where(overlong.unsqueeze(1) & ~rewards.isnan(), 0.0, rewards)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        if "prompt" not in inputs[0]:
            raise ValueError(f"`train_dataset` has no column `prompt`, only {sorted(inputs[0])}. Rename one.")
        beta = self.beta
        if self.args.kl_target == "old":
            self.beta = 0.0  # there is no reference model to ask
        try:
            with self._appended() as appended:
                output = super()._generate_and_score_completions(inputs)
            self._record_rollout(appended)
        finally:
            self.beta = beta
            context, rollout, self._context, self._rollout = self._context, self._rollout, None, None
            self._expects_old = False
        # Rows that TRL masks (`mask_truncated_completions`) are not scored either
        context["scored"] = context["scored"] & output["completion_mask"].any(1, keepdim=True)
        self._set_advantages(output, context)
        output["num_items_in_batch"] = self.accelerator.gather(context["scored"].sum()).sum()
        output.update(context)
        if self._mode == "eval":
            output["counted"] = self._counted
        if self._recorded:
            output["sampling_per_token_logps"] = rollout.logprobs
        return output

    def _record_rollout(self, appended: dict[str, list[float]]) -> None:
        """TRL's metrics of a generation, and ours, over the rows that are no repeats."""
        rollout, siblings = self._rollout, self.num_generations if self._mode == "train" else self.num_generations_eval
        lengths = rollout.completion_mask.sum(1)
        last = rollout.completion_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = torch.isin(last, torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device))
        terminated = lengths.float().masked_fill(~ended, torch.nan)
        rows = {"completions/clipped_ratio": ~ended, "decode/forward_passes": rollout.num_forward_passes}
        rows |= {f"completions/{kind}_length": lengths for kind in ("mean", "min", "max")}
        rows |= {f"completions/{kind}_terminated_length": terminated for kind in ("mean", "min", "max")}
        # Gathered already: of these, this process's
        mine = slice(
            self.accelerator.process_index * len(rollout), (self.accelerator.process_index + 1) * len(rollout)
        )
        rewards, total = self._rewards[mine], self._total_rewards()[mine]
        groups = self._total_rewards().view(-1, siblings)
        equal = groups.nan_to_num(torch.inf).amin(1) == groups.nan_to_num(-torch.inf).amax(1)
        for name, values in zip(self.reward_func_names, rewards.unbind(1), strict=True):
            rows |= {f"rewards/{name}/mean": values, f"rewards/{name}/std": values}
        rows |= {"reward": total, "reward_std": total, "frac_reward_zero_std": equal.repeat_interleave(siblings)[mine]}
        self._note_rows(rows, self._counted)
        counted = self._counted.unsqueeze(1)
        forwards = (rollout.num_forward_passes * self._counted).sum()
        self._note_ratios({"decode/tokens_per_forward": (((rollout.step_map >= 0) & counted).sum(), forwards)})
        self._metrics[self._mode]["num_tokens"] = appended.pop("num_tokens")
        num_rows = self.accelerator.reduce(self._counted.sum(), "sum").item()
        for name in appended.keys() - rows.keys():  # logged by reward functions
            for value in appended[name]:
                self._note(name, value, num_rows)

    def _total_rewards(self) -> torch.Tensor:
        """Of all processes, `(rows,)`; NaN where no function gave one."""
        total = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        return total.masked_fill(self._rewards.isnan().all(1), torch.nan)

    def _set_advantages(self, output: dict, context: dict) -> None:
        """Advantages of our own kinds, groups that are dropped, and a word when there is nothing to learn."""
        mode = "train" if self.model.training else "eval"
        siblings = self.num_generations if mode == "train" else self.num_generations_eval
        advantages = self.accelerator.gather(output["advantages"])
        kept = torch.ones_like(advantages, dtype=torch.bool)
        if self.args.scale_rewards == "population":
            advantages = population_z_score(self._total_rewards(), siblings)
        if self.args.accuracy_range is not None and mode == "train":
            kept = in_accuracy_range(self._rewards[:, 0], siblings, *self.args.accuracy_range)
            advantages = torch.where(kept, advantages, 0.0)
            self._note("frac_groups_dropped", 1 - kept.float().mean().item(), len(kept))
        if mode == "train":
            self._warn_without_signal(advantages, kept)

        rows = len(output["advantages"])
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        logged = self._logs["advantages"]
        earlier = list(logged)[: max(len(logged) - len(advantages), 0)]
        logged.clear()
        logged.extend(earlier + advantages.tolist())
        context["scored"] = context["scored"] & kept[mine].unsqueeze(1)
        if self.loss_type in _ROW_NORMALISED and not kept.all():
            # These losses divide by the number of rows; a larger weight of the kept ones makes up for those dropped.
            # The KL term is scaled alike, see `_compute_loss`.
            scale = len(kept) / kept.sum().clamp(min=1)
            advantages = advantages * scale
            context["kl_scale"] = scale
        output["advantages"] = advantages[mine]

    def _warn_without_signal(self, advantages: torch.Tensor, kept: torch.Tensor) -> None:
        if (advantages.abs() > 1e-8).any():
            return
        self._batches_without_signal += 1
        if self._batches_without_signal not in (1, 10, 100, 1000, 10000):  # said early and again, not in every step
            return
        batches = f"Rollouts of this run without any so far: {self._batches_without_signal}."
        if not kept.any():
            logger.warning(
                f"All groups were dropped: the accuracy of none lies in `accuracy_range={self.args.accuracy_range}` "
                "(a response is accurate if the first of `reward_funcs` gives more than 0.5). This step has no "
                f"gradient. Widen `accuracy_range`, or use problems the model solves sometimes. {batches}"
            )
            return
        mean = self._rewards.nanmean(0).tolist()
        means = ", ".join(f"{name} {m:.3g}" for name, m in zip(self.reward_func_names, mean, strict=True))
        if (self._rewards[:, 0] > 0.5).all():
            logger.warning(
                "All answers of this step are right (the first of `reward_funcs` gives each more than 0.5; mean "
                f"rewards: {means}), and equal within each group, so every advantage is 0 and the policy loss teaches "
                f"nothing. Use harder problems, or a higher `temperature`. {batches}"
            )
            return
        logger.warning(
            "No group has any reward signal: within each group of responses to the same prompt all rewards are equal "
            f"(mean rewards: {means}), so every advantage is 0 and the policy loss teaches nothing. Use easier or "
            "harder problems, raise `num_generations` or `temperature`, or check that `reward_funcs` can read the "
            f"answers and that `max_completion_length` leaves room for them. {batches}"
        )

    # ---------------------------------------------------------------------------------------------- log-probabilities

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Log-probabilities (and entropies) of the response tokens, each in its round of the objective. The width is that
        of the canvas, which may be larger than `logits_to_keep`; unscored positions are 0.
        """
        if self._scores is not None:
            return self._scores
        expects_old, self._expects_old = self._expects_old, False
        recorded = self._rollout.logprobs if self._rollout is not None and self._recorded else None
        if expects_old and self.args.use_rollout_logprobs:
            return recorded, None, None

        prompt_length = input_ids.size(1) - logits_to_keep
        batch = {"prompt_ids": input_ids[:, :prompt_length], "prompt_mask": attention_mask[:, :prompt_length]}
        batch |= self._context or self._fully_masked(input_ids[:, prompt_length:], attention_mask[:, prompt_length:])
        rows = len(input_ids)
        chunk = batch_size or rows
        results = [
            self._score({k: v[start : start + chunk] for k, v in batch.items()}, model, compute_aux_loss)
            for start in range(0, rows, chunk)
        ]
        logps, entropies, aux_losses = zip(*results, strict=True)
        logps = torch.cat(logps)
        if expects_old and recorded is not None:
            self._check_on_policy(logps, recorded, batch["scored"])
        return (
            logps,
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    @staticmethod
    def _fully_masked(completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Without a rollout: every response token is scored with all of them masked."""
        scored = completion_mask.bool()
        return {
            "canvas_ids": completion_ids,
            "canvas_mask": completion_mask,
            "step_map": torch.where(scored, 0, -1),
            "scored": scored,
        }

    def _score(self, batch: dict[str, torch.Tensor], model: nn.Module, compute_aux_loss: bool):
        """One forward pass: log-probabilities `(B, R)`, entropies `(B, R)` and the auxiliary loss of some rows."""
        rounds = self.objective(batch, self._grid)
        packed = pack_batch(self, batch, rounds)
        options = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                plan=packed.plan,
                score_index=packed.score_index,
                shift_labels=packed.labels.unsqueeze(0),
                fused_lm_head=True,
                use_cache=False,
                **options,
            )
        logps = packed.scatter(outputs.log_probs.squeeze(0))  # (rounds, B, R)
        if any(r.weight is not None for r in rounds):
            logps = logps * torch.stack([r.scored.float() if r.weight is None else r.weight for r in rounds])
        entropies = None
        if outputs.entropy is not None:
            times_scored = torch.stack([r.scored for r in rounds]).sum(0).clamp(min=1)
            entropies = packed.scatter(outputs.entropy.squeeze(0)).sum(0) / times_scored
        return logps.sum(0), entropies, outputs.aux_loss

    def _check_on_policy(self, logps: torch.Tensor, recorded: torch.Tensor, scored: torch.Tensor) -> None:
        """Rollout and trainer must agree on the log-probabilities of the same tokens under the same weights."""
        if self.args.on_policy_check == "off" or (self.model.training and self._drops_out):
            return
        difference = ((logps.detach() - recorded).abs() * scored).float()
        sums = self.accelerator.reduce(torch.stack([difference.sum(), scored.sum().float()]), reduction="sum")
        mean = (sums[0] / sums[1].clamp(min=1)).item()
        maximum = self.accelerator.gather(difference.max()).max().item()
        self._note("sampling/sampling_logp_difference/mean", mean, sums[1].item())
        self._note("sampling/sampling_logp_difference/max", maximum)
        if not self._comparable:
            return
        warning = judge_difference(mean, maximum, self._full_precision)
        if warning and self.args.on_policy_check == "error":
            raise RuntimeError(warning)
        if warning:
            logger.warning(warning)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model, inputs):
        inputs = dict(inputs)
        if "canvas_ids" in inputs:
            # To TRL the completion is the canvas, and what counts in it are the scored tokens
            inputs["completion_ids"] = inputs["canvas_ids"]
            inputs["completion_mask"] = inputs["scored"].long()
            self._context = {key: inputs[key] for key in _CONTEXT}
        try:
            logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
            )
        finally:
            self._context = None
        old = inputs.get("old_per_token_logps")
        recorded = inputs.get("sampling_per_token_logps")
        same_weights = not self.model.training or self.state.global_step == self._policy_step
        unchecked = old is None or self.args.use_rollout_logprobs  # old ones were checked when they were computed
        if recorded is not None and same_weights and unchecked:
            self._check_on_policy(logps, recorded, inputs["scored"])
        if old is not None:
            logps = old + (logps - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)  # no gradient beyond the bounds
        beta = self.beta
        if beta != 0.0 and self.args.kl_target == "old":
            inputs["ref_per_token_logps"] = logps.detach() if old is None else old
        if beta != 0.0 and inputs.get("kl_scale") is not None:
            self.beta = beta * inputs["kl_scale"].item()
        regularisers = self.entropy_coef, self.router_aux_loss_coef
        if not self.model.training:  # they are no mean over what an evaluation holds, and have metrics of their own
            self.entropy_coef = self.router_aux_loss_coef = 0.0
        self._scores = logps, entropies, aux_loss
        try:
            with self._appended() as appended:
                loss = super()._compute_loss(model, inputs)
        finally:
            self._scores, self.beta = None, beta
            if not self.model.training:
                self.entropy_coef, self.router_aux_loss_coef = regularisers
        self._record_loss(appended, inputs, loss.detach())
        return loss

    def _record_loss(self, appended: dict[str, list[float]], inputs: dict, loss: torch.Tensor) -> None:
        """TRL's metrics of a micro-batch, each with the tokens or rows it is a mean of."""
        scored = inputs["completion_mask"]
        counted = inputs.get("counted", torch.ones_like(scored[:, 0])).sum()
        sizes = torch.stack([scored.sum(), counted, torch.ones_like(scored[:, 0]).sum()])
        tokens, num_counted, rows = self.accelerator.reduce(sizes, "sum").tolist()
        by_row = self.loss_type in _ROW_NORMALISED
        if self._mode == "eval":
            if by_row:
                total = loss * len(scored)
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
                self._note(name, value * (rows / tokens if scored.size(1) == 1 else 1), tokens)

    # ----------------------------------------------------------------------------------------- evaluation, checkpoints

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_rows = 0  # every evaluation draws the same numbers
        self._eval_size = len(dataloader.dataset) * self.num_generations_eval if has_length(dataloader) else None
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._grid is not None and self._grid != self.model.config.block_size:
            logger.warning_once(
                f"The model was trained with `block_length={self.block_length}`, but its config keeps "
                f"`block_size={self.model.config.block_size}`. Decode with `block_length={self.block_length}`, or set "
                "`model.config.block_size` before saving."
            )
        super().save_model(output_dir, _internal_call=_internal_call)
