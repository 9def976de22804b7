from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from .._compat import use_small_logprob_tiles
from ..objectives import LossInputs, Objective, make_rl_objective, name_of
from ..scoring import Scorer, Scores
from ..types import Grid, Round, Rows
from .advantages import SCALES, Estimator, GroupEstimator, SignalWatch
from .batch_weights import weigh_batch
from .completion_tables import CompletionTablesMixin
from .constructor_checks import (
    check_attention,
    check_beta,
    check_context,
    check_enough_prompts,
    check_eos,
    check_model,
    check_options,
    check_peft,
    check_precision,
    check_prompt_column,
    check_reward_columns,
    check_router_loss,
    check_sharding,
    fill_task_type,
    find_mask_token,
)
from .diffusion_grpo_config import DiffusionGRPOConfig
from .draws import CountingDraws
from .earlier_logps import earlier_logps, num_scored
from .greedy_rewards import greedy_rewards
from .grpo_metrics import ROW_NORMALISED, Generation, GRPOMetricsMixin
from .metrics import new_notes
from .model_card import DiffusionModelCardMixin
from .on_policy import OnPolicyCheck
from .papers import RL_PAPERS
from .process_rewards import check_chunk_lengths
from .processes import most_of
from .published_checkpoints import PublishedCheckpointMixin
from .reference_model import building_reference
from .reward_functions import RewardFunctionsMixin
from .rollout_resume import RolloutResumeMixin
from .rollouts import EngineRollouts, Rollouts, check_rollout, make_parameters, seed_of
from .trl_loss import ScoredModel, own_loss, temporarily, trl_inputs
from .unread_options import UNREAD_IN_RL, check_unread


logger = get_logger(__name__)


class DiffusionGRPOTrainer(
    PublishedCheckpointMixin,
    RolloutResumeMixin,
    CompletionTablesMixin,
    DiffusionModelCardMixin,
    RewardFunctionsMixin,
    GRPOMetricsMixin,
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
            What is masked and scored: a name from `dllm_trl.objectives.OBJECTIVES`, an instance, or a function of
            [`Rows`] that returns rounds. By default `args.objective`, and without that the rollout is replayed.
        rollouts ([`Rollouts`], *optional*):
            Where responses come from. By default the engine of this package decodes them in this process.
        estimator ([`Estimator`], *optional*):
            What responses are worth. By default each is compared with its siblings, as `scale_rewards` says.
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
        rollouts: Rollouts | None = None,
        estimator: Estimator | None = None,
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
            check_prompt_column(name, dataset)
            check_reward_columns(reward_funcs, name, dataset)
        self.objective = self._make_objective(args, args.objective if objective is None else objective)
        check_beta(args, self.objective)
        name = name_of(self.objective)
        self._paper = RL_PAPERS.get(name, {})
        if name not in args.objective_options():  # not the method that a subclass is named for
            self._name, self._tag_names = DiffusionGRPOTrainer._name, DiffusionGRPOTrainer._tag_names

        beta = args.beta
        with building_reference(model, args):
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
        self.beta = beta
        check_sharding(type(self).__name__, self._dist.fsdp_version)
        use_small_logprob_tiles(self.accelerator.device.type)
        if self.scale_rewards in SCALES:
            self.scale_rewards = "none"  # TRL centres the rewards, the estimator does the rest

        config = self.model.config
        config.use_cache = use_cache  # `Trainer` switches it off, and the checkpoints would say so
        check_attention(config, args, self.objective)
        check_enough_prompts(self.train_dataset, args)
        # Full attention: the rollout's blocks, which training does not know. By default the whole response is one
        self.block_length = args.block_length or config.block_size or self.max_completion_length
        self.grid = Grid.of(config.diffusion_attention, self.block_length)
        self.mask_token_id = find_mask_token(config, self._tokenizer)
        self.generation_config = make_parameters(self)
        check_context(self)
        check_chunk_lengths(self.reward_func_names, self.reward_funcs, args.reward_chunk_length)

        self.rollouts = EngineRollouts(self) if rollouts is None else rollouts
        self.estimator = estimator or GroupEstimator(args.scale_rewards, args.accuracy_range, args.gamma)
        self.scorer = Scorer(
            self.mask_token_id,
            config.logit_shift,
            args.rounds_per_forward,
            head="fused",
            most=most_of(self.accelerator),
        )
        self._on_policy = OnPolicyCheck(self)
        self._weighs_batch = type(self.objective).log_weights is not Objective.log_weights
        self._watch_signal = SignalWatch(self.reward_func_names, args.accuracy_range)
        self._notes = new_notes()
        self._generation = None  # at TRL's door: set and taken back by `_generate_and_score_completions`

    def _make_objective(self, args: DiffusionGRPOConfig, objective: str | Objective | None) -> Objective:
        own = args.objective_options()
        objective = next(iter(own)) if objective is None else objective
        options = own.get(objective, {}) if isinstance(objective, str) else {}
        return make_rl_objective(objective, args.num_iterations, **(options | (args.objective_kwargs or {})))

    # ------------------------------------------------------------------------------------------------------- rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if max(max(ids, default=0) for ids in prompt_ids) >= self.model.config.vocab_size:
            raise ValueError(
                f"`processing_class` gives token ids beyond the model's vocabulary of {self.model.config.vocab_size}: "
                "it is not the tokenizer of this model."
            )
        generation = self._generation
        generation.first_row = self._first_row(len(prompt_ids))
        if self._mode == "train":
            self.rollouts.sync(self.state.global_step)
        rollout = self.rollouts.generate(
            prompt_ids, self.generation_config, seed_of(self.args, self._mode), generation.first_row
        )
        check_rollout(rollout, self.objective)
        generation.rollout = rollout = rollout.to(self.accelerator.device)
        rows = generation.first_row + torch.arange(len(rollout), device=self.accelerator.device)
        known = self._mode == "eval" and self._eval_size is not None
        generation.counted = rows < self._eval_size if known else torch.ones_like(rows, dtype=torch.bool)
        lengths = rollout.completion_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)], None

    def _generate_and_score_completions(self, inputs):
        if "prompt" not in inputs[0]:
            raise ValueError(f"`train_dataset` has no column `prompt`, only {sorted(inputs[0])}. Rename one.")
        self._generation = generation = Generation()
        # Log-probabilities are computed below, of rows; `beta=0`: TRL asks for none of a reference
        with self._appended() as appended, temporarily(self, beta=0.0):
            output = super()._generate_and_score_completions(inputs)
        self._generation = None
        self._record_rollout(generation, appended)

        # Rows that TRL masks (`mask_truncated_completions`) and repeats do not count
        rows = generation.rollout.rows(self.args.num_scored_pads)
        rows.trained &= (output["completion_mask"].any(1) & generation.counted).unsqueeze(1)
        generation.completed = greedy_rewards(self, inputs, generation, rows)
        advantage = self._estimate(generation, output["advantages"], rows)
        mine = self._mine(len(rows))
        rows.trained &= advantage.kept[mine].unsqueeze(1)
        rows.draws = self.objective.draw(rows, CountingDraws(seed_of(self.args, self._mode), generation.first_row))

        output |= rows.to_batch() | earlier_logps(self, rows, generation.rollout) | num_scored(self, rows)
        output |= {f"notes/{name}": noted[mine] for name, noted in advantage.notes.items()}
        output["advantages"] = advantage.values[mine] if advantage.values.dim() == 1 else advantage.values
        output["num_items_in_batch"] = self.accelerator.gather(rows.trained.sum()).sum()
        output["policy_step"] = torch.tensor(self.state.global_step)
        if self.loss_type in ROW_NORMALISED and not advantage.kept.all():
            # These losses divide by the number of rows; a larger weight of the kept ones makes up for those dropped
            output["kept_scale"] = len(advantage.kept) / advantage.kept.sum().clamp(min=1)
        if self._mode == "eval":
            output["counted"] = generation.counted
        if self._on_policy.recorded:
            output["sampling_per_token_logps"] = generation.rollout.logprobs
        return output

    # ---------------------------------------------------------------------------------------------- log-probabilities

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """TRL's door: in its loss the `model` is a [`ScoredModel`]; at a rollout it asks too early."""
        return (model.logps, model.entropies, model.aux_loss) if isinstance(model, ScoredModel) else (None, None, None)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _prepare_inputs(self, generation_batch):
        inputs, steps = super()._prepare_inputs(generation_batch), self.args.gradient_accumulation_steps
        if self._mode == "train" and self._step % steps == 0 and self._weighs_batch:
            first = self._step % self.args.steps_per_generation
            weigh_batch(self, self._buffered_inputs[first : first + steps])
        return inputs

    def _compute_loss(self, model, inputs):
        rows = Rows.from_batch(inputs, self.grid)
        scores, parts = self._score(model, inputs, rows, aux_loss=self.aux_loss_enabled)
        own = self.objective.loss(parts)
        with self._appended() as appended:
            if own is not None:
                loss = own_loss(self, own, scores)
            else:  # that of `loss_type`
                inputs, settings = trl_inputs(self, inputs, parts, self._num_items(inputs))
                with temporarily(self, **settings):
                    loss = super()._compute_loss(ScoredModel.of(parts, scores), inputs)
        self._record_loss(appended, inputs, parts.scored, loss.detach(), own is not None)
        return loss

    def _score(self, model: nn.Module, inputs: dict, rows: Rows, **options) -> tuple[Scores, LossInputs]:
        view = self._view()
        rounds = self.objective.rounds(rows, view)
        with self.accelerator.autocast():
            scores = self.scorer(model, rows, rounds, **options)
        return scores, self._loss_inputs(inputs, rows, rounds, scores, view)

    def _num_items(self, inputs: dict) -> torch.Tensor:
        """Scored tokens of the generation batch that `inputs` are part of, under the view of this update."""
        counts = inputs.get("num_scored")
        return inputs["num_items_in_batch"] if counts is None else counts[0, self._view()]

    def _view(self) -> int:
        """The view that this update takes: the next one each time the rollout comes round."""
        if self._mode == "eval":
            return 0
        return self._step // self.args.steps_per_generation % self.num_iterations % self.objective.num_views

    def _loss_inputs(self, inputs: dict, rows: Rows, rounds: list[Round], scores: Scores, view: int) -> LossInputs:
        token_logps = scores.dense("logps")
        logps = self.objective.reduce(token_logps, rounds)
        old, ref = (None if x is None else x[:, view] for x in (inputs.get("old_logps"), inputs.get("ref_logps")))
        recorded = inputs.get("sampling_per_token_logps")
        same_weights = self._mode == "eval" or self.state.global_step == inputs["policy_step"]
        unchecked = old is None or self.args.use_rollout_logprobs  # old ones were checked when they were computed
        if recorded is not None and same_weights and unchecked:
            self._on_policy(self, logps, recorded, rows.trained)
        if self.args.kl_target == "old":
            ref = logps.detach() if old is None else old
        micro_batches = self.args.steps_per_generation if self._mode == "train" else 1
        items = torch.stack([self._num_items(inputs), inputs["num_items_in_batch"]])
        scored, trained = (items / (self.accelerator.num_processes * micro_batches)).clamp(min=1e-8)
        settings = (self.epsilon_low, self.epsilon_high, self.beta, inputs.get("batch_weights"), trained)
        noted = {key.removeprefix("notes/"): value for key, value in inputs.items() if key.startswith("notes/")}
        return LossInputs(rows, rounds, token_logps, logps, old, ref, inputs["advantages"], scored, *settings, noted)
