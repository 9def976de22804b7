import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import ModelOutput
from trl import SFTTrainer
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from .._compat import use_small_logprob_tiles
from ..generation.checks import naming_template
from ..objectives import DEFAULT_SFT_OBJECTIVES, make_sft_objective
from ..scoring import Scorer, Scores
from ..scoring.layout import PackedRounds
from ..types import Grid, Round, Rows
from .chat_template import mark_assistant
from .constructor_checks import (
    check_eos,
    check_kind,
    check_model,
    check_peft,
    check_precision,
    check_router_loss,
    fill_task_type,
    find_mask_token,
)
from .curriculum import follow_curriculum
from .documents import longest_document, unpack_rows
from .draws import CountedDraws, PooledDraws, RowDraws, draw_levels, make_generator
from .exact_resume import ExactResumeMixin
from .metrics import RatioMetricsMixin, new_notes
from .model_card import DiffusionModelCardMixin
from .neftune import draw_noise
from .papers import PAPERS
from .processes import most_of
from .published_checkpoints import PublishedCheckpointMixin
from .sft_config import DiffusionSFTConfig
from .sft_data import (
    SampleLengthsCollator,
    StepMapCollator,
    check_sft_columns,
    check_step_maps,
    check_tokens,
    prepare_step_maps,
)
from .sft_loss import loss_weights, num_loss_items, num_scored, sft_loss
from .unread_options import UNREAD, check_unread


logger = get_logger(__name__)


@dataclass
class DiffusionSFTOutput(ModelOutput):
    r"""
    What [`DiffusionSFTTrainer.compute_loss`] returns with `return_outputs=True`.

    Args:
        logits (`torch.FloatTensor` of shape `(B, S, V)`):
            Logits of the tokens that this corruption scored, 0 elsewhere.
        labels (`torch.LongTensor` of shape `(B, S)`):
            Those tokens, -100 elsewhere.
    """

    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class DiffusionSFTTrainer(
    PublishedCheckpointMixin, ExactResumeMixin, DiffusionModelCardMixin, RatioMetricsMixin, SFTTrainer
):
    r"""
    [`~trl.SFTTrainer`] for diffusion language models. Datasets are prepared as in TRL (text, messages, prompt and
    completion, `completion_only_loss`, `assistant_only_loss`, truncation, packing); an objective masks some of the
    trained tokens, and the model learns to predict them.

    The corruption is a function of `args.seed`, the optimizer step and the sequence's place in the batch: a resumed
    run, another number of processes and another split into accumulation steps see the same. In evaluation it is a
    function of the sequence itself, so losses of different evaluations can be compared.

    Example:

    ```python
    from datasets import load_dataset
    from dllm_trl import DiffusionSFTTrainer

    trainer = DiffusionSFTTrainer(
        model="JetLM/SDAR-1.7B-Chat",
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config, formatting_func:
            As in [`~trl.SFTTrainer`]. `compute_metrics` gets logits and labels of the tokens that were scored, and
            labels -100 elsewhere.
        args ([`DiffusionSFTConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        compute_loss_func:
            Not supported, must stay `None`: write an objective.
    """

    _tag_names = ["trl", "dllm-trl", "sft"]
    _name = "Diffusion SFT"
    # `compute_loss` divides by what the whole accumulated batch has of trained tokens (or sequences)
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        args: DiffusionSFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,  # noqa: F821
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        formatting_func: Callable[[dict], str] | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DiffusionSFTConfig(f"{model_name.split('/')[-1]}-Diffusion-SFT")
        elif not isinstance(args, DiffusionSFTConfig):
            check_kind(args, DiffusionSFTConfig)
            values = args.to_dict()
            values["hub_token"] = args.hub_token  # to_dict hides it
            args = DiffusionSFTConfig(**values)
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported by `DiffusionSFTTrainer`: it gets the logits of a causal model. "
                "Pass a callable as `DiffusionSFTConfig(objective=...)`, or override `compute_loss`."
            )
        check_precision(args)
        check_unread(type(self).__name__, args, UNREAD)
        check_peft(model, peft_config)
        check_eos(processing_class, args.eos_token)
        fill_task_type(model, peft_config)
        config = check_model(model, args.model_init_kwargs, args.trust_remote_code)
        use_cache = config.use_cache
        check_router_loss(config, args)
        if not formatting_func and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            check_sft_columns("train_dataset", train_dataset, args.dataset_text_field)
            check_sft_columns("eval_dataset", eval_dataset, args.dataset_text_field)
        self.objective = make_sft_objective(
            args.objective,
            config.diffusion_attention,
            noise_per=args.noise_per,
            eps=args.noise_eps,
            largest=args.noise_max,
            weighting=args.weighting,
            cart_p=args.cart_p,
            shrink=args.shrink,
            block_length=args.block_length,
        )
        self.loss_norm = args.loss_norm or self.objective.loss_norm
        name = args.objective or DEFAULT_SFT_OBJECTIVES[config.diffusion_attention]
        self._paper = PAPERS.get(name, {}) if isinstance(name, str) else {}
        if self.objective.step_map == "required":
            check_step_maps("train_dataset", train_dataset, args.objective)
            check_step_maps("eval_dataset", eval_dataset, args.objective)

        # TRL marks the assistant's turns in templates that it knows by heart only
        marked = None
        if args.assistant_only_loss and args.chat_template_path is None:
            if processing_class is None:
                path = model if isinstance(model, str) else get_config_model_id(model.config)
                revision = (args.model_init_kwargs or {}).get("revision")
                processing_class = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
            published = processing_class.chat_template
            if not has_generation_markers(published):
                marked = mark_assistant(published)
                processing_class.chat_template = marked or published

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        if marked is not None:
            processing_class.chat_template, self.chat_template = published, marked
        use_small_logprob_tiles(self.accelerator.device.type)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise ValueError(
                "Context, sequence and tensor parallelism are not supported by `DiffusionSFTTrainer`: it corrupts and "
                "packs whole sequences. Use DDP, FSDP or DeepSpeed ZeRO."
            )

        if self.objective.step_map != "unused":
            self.data_collator = StepMapCollator(self.data_collator, self.objective.step_map == "required")
        if self.padding_free:
            self.data_collator = SampleLengthsCollator(self.data_collator)
        self._notes = new_notes()
        self.neftune_noise_alpha = None  # stock noise would know neither rows nor copies: see `compute_loss`
        config = self.model.config
        config.use_cache = use_cache  # `Trainer` switches it off, and the checkpoints would say so
        check_tokens("train_dataset", self.train_dataset, config.vocab_size)
        check_tokens("eval_dataset", self.eval_dataset, config.vocab_size)
        self.block_length = args.block_length or config.block_size
        # Full attention: what it trains on has no blocks
        blocks = config.diffusion_attention == "block"
        self.grid = Grid.of(config.diffusion_attention, self.block_length if blocks else None)
        self.mask_token_id = find_mask_token(config, self._tokenizer)
        self.scorer = Scorer(
            self.mask_token_id,
            config.logit_shift,
            args.rounds_per_forward,
            head="fused",
            share_prompts=args.neftune_noise_alpha is None,  # each row has noise of its own
            most=most_of(self.accelerator),
        )
        self._fill_token_id = self._find_fill()
        # A chat template may end turns with another token than the tokenizer's EOS: decoding stops at all of these.
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self._eos_token_ids = torch.tensor([i for i in [*stops, self._tokenizer.eos_token_id] if i is not None])
        self._curriculum = follow_curriculum(self)
        limit = config.max_position_embeddings
        for name in ("max_length", "eos_fill_length"):
            value = getattr(args, name)
            if value is not None and value > limit:
                logger.warning(
                    f"`{name}={value}` allows sequences longer than the model's context of {limit} tokens. Set "
                    f"`{name}={limit}`."
                )

    def _find_fill(self) -> int | None:
        """The token that fills up sequences that end, `None` if nothing does."""
        fills = self.objective.fills
        if self.args.eos_fill and not fills:
            raise ValueError(
                f"`eos_fill=True` does not go with `objective={self.args.objective!r}`, which trains no padding. Set "
                "`eos_fill=None`."
            )
        if self.args.eos_fill_length is not None and self.grid.attention == "block":
            raise ValueError(
                "`eos_fill_length` is for models with full attention: with block attention sequences are filled to "
                "the end of their last block. Set it to `None`."
            )
        if not (fills if self.args.eos_fill is None else self.args.eos_fill):
            return None
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                "`eos_fill=True` needs an EOS token, but `processing_class` has none. Set "
                "`processing_class.eos_token`, or `eos_fill=False`."
            )
        return self._tokenizer.eos_token_id

    # ---------------------------------------------------------------------------------------------------------- data

    @naming_template("processing_class")
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepare = super()._prepare_dataset
        if self.objective.step_map == "unused" or "step_map" not in get_dataset_column_names(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return prepare_step_maps(prepare, dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.objective.step_map != "unused" and "step_map" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "step_map"]

    # ---------------------------------------------------------------------------------------------------- corruption

    def _rows(self, inputs: dict[str, torch.Tensor], fill_to: int | None = None) -> tuple[Rows, torch.Tensor]:
        fill_to = fill_to or self.args.eos_fill_length
        fills = self.grid.attention == "block" or fill_to is not None
        return unpack_rows(
            inputs["input_ids"],
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            grid=self.grid,
            fill_token_id=self._fill_token_id if fills else None,
            fill_to=fill_to if self._fill_token_id is not None else None,
            eos_token_ids=self._eos_token_ids,
            step_map=inputs.get("step_map"),
        )

    def _without_repeats(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An evaluation's batch in which nothing is trained of the samples that accelerate repeats to fill it up."""
        place = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not place.end_of_dataloader or place.remainder < 1:
            return inputs
        labels, lengths = inputs["labels"].clone(), inputs.get("sample_lengths")
        samples = len(labels) if lengths is None else len(lengths)
        first = max(place.remainder - self.accelerator.process_index * samples, 0)
        if lengths is None:
            labels[first:] = -100
        else:
            labels[:, int(lengths[:first].sum()) :] = -100
        return {**inputs, "labels": labels}

    def _longest(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> int | None:
        """Full attention: tokens of the longest document of the whole step, to which the others are filled up."""
        if self.grid.attention == "block" or self._fill_token_id is None or self.args.eos_fill_length is not None:
            return None
        lengths = [longest_document(b["input_ids"], b.get("attention_mask"), b.get("position_ids")) for b in batches]
        return int(self.accelerator.gather(torch.stack(lengths).max().to(device)).max())

    def _draws_by_content(self, rows: Rows) -> RowDraws:
        """Each row draws from a generator of its own, seeded by what the row holds."""
        contents = [ids[exists.bool()].cpu().numpy() for ids, exists in zip(rows.canvas_ids, rows.canvas_mask)]
        seeds = [zlib.crc32(ids.tobytes()) for ids in contents]
        return RowDraws([make_generator(self.args.seed, seed) for seed in seeds], self.args.antithetic)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        self._curriculum = follow_curriculum(self)
        longest = self._longest(batches, device)
        corruptions = [self._rows(batch, longest) for batch in batches]
        needs = []
        for rows, _ in corruptions:
            counted = CountedDraws()
            self.objective.draw(rows, counted)
            needs.append([counted.num_levels, counted.num_uniform])
        needs = torch.tensor(needs, device=device)  # (accumulation steps, 2)
        # In the order in which one process would have met the batches: by accumulation step, then by process.
        needs = self.accelerator.gather(needs[None]).transpose(0, 1).reshape(-1, 2).cpu()
        totals, ends = needs.sum(0).tolist(), needs.cumsum(0)

        generator = make_generator(self.args.seed, self.state.global_step)
        levels = draw_levels(totals[0], generator, self.args.antithetic)
        uniform = torch.rand(totals[1], generator=generator)
        num_items = torch.zeros(1, dtype=torch.long, device=device)
        for step, (rows, source) in enumerate(corruptions):
            place = step * self.accelerator.num_processes + self.accelerator.process_index
            (level_end, uniform_end), (num_levels, num_uniform) = ends[place].tolist(), needs[place].tolist()
            pool = PooledDraws(
                levels[level_end - num_levels : level_end], uniform[uniform_end - num_uniform : uniform_end]
            )
            rows = replace(rows, draws=self.objective.draw(rows, pool))
            rounds = self.objective.rounds(rows)
            batches[step]["rows"] = rows, rounds, source
            num_items += num_loss_items(rows.trained.sum(1), self.loss_norm, num_scored(rounds))
        if self.args.average_tokens_across_devices:
            num_items = self.accelerator.gather(num_items)
        return batches, num_items.sum()

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "rows" in inputs:
            rows, rounds, source = inputs["rows"]
        else:
            rows, source = self._rows(self._without_repeats(inputs))
            rows = replace(rows, draws=self.objective.draw(rows, self._draws_by_content(rows)))
            rounds = self.objective.rounds(rows)
        scores = self.scorer(
            model, rows, rounds, self.objective.causal, aux_loss=self.aux_loss_enabled, noise=self._noise(model)
        )

        nll = -scores.logps
        if self.args.loss_type == "dft":
            nll = nll * scores.logps.exp().detach()
        num_trained = rows.trained.sum(1)
        loss_weight = loss_weights(rounds, scores.index, nll)
        loss = sft_loss(nll, loss_weight, scores.index[1], num_trained, self.loss_norm, num_items_in_batch)
        self._record(inputs, scores, loss.detach(), num_loss_items(num_trained, self.loss_norm, len(nll)))
        # As in TRL: the normaliser counts all processes, over which DDP averages the gradients
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / steps
        return (loss, self._outputs(model, inputs, rows, rounds, source)) if return_outputs else loss

    def _noise(self, model: nn.Module) -> Callable[[PackedRounds, Rows], torch.Tensor] | None:
        alpha = self.args.neftune_noise_alpha
        if alpha is None or not model.training:
            return None
        seeds = self.args.seed, self.state.global_step
        return lambda packed, rows: draw_noise(packed, rows, alpha, self.model.config.hidden_size, *seeds)

    @torch.no_grad()
    def _outputs(self, model, inputs, rows: Rows, rounds: list[Round], source: torch.Tensor) -> DiffusionSFTOutput:
        """Logits and labels where the batch holds the scored tokens."""
        packed = self.scorer.pack(rows, rounds, self.objective.causal)
        logits = model(**packed.model_inputs()).logits[0]
        source = source[packed.index[1:]]
        known = source >= 0  # fill has no place in the batch
        scores = logits.new_zeros(inputs["input_ids"].numel(), logits.size(-1))
        scores[source[known]] = logits[known]
        labels = torch.full_like(inputs["input_ids"], -100).flatten()
        labels[source[known]] = packed.labels[known]
        shape = inputs["input_ids"].shape
        return DiffusionSFTOutput(logits=scores.view(*shape, -1), labels=labels.view(shape))

    def _record(
        self, inputs: dict[str, torch.Tensor], scores: Scores, loss: torch.Tensor, num_items: torch.Tensor
    ) -> None:
        """TRL's metrics, over the scored tokens. `loss` is a mean over `num_items` in evaluation."""
        scored = torch.tensor(len(scores.logps), device=loss.device)
        sums = {"entropy": (scores.entropies.detach().sum(), scored)}
        sums["mean_token_accuracy"] = (scores.is_top1.sum().float(), scored)
        if self._mode == "eval":
            sums["loss"] = (loss * num_items, num_items)
        else:
            mask = inputs.get("attention_mask")
            tokens = torch.tensor(inputs["input_ids"].size(1), device=loss.device) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.reduce(tokens, "sum").item()
        self._note_ratios(sums)
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]
        if self._curriculum is not None:
            self._metrics[self._mode]["block_length"] = [self.block_length]
        if self.aux_loss_enabled:  # of what shares a micro-batch: there is no ratio of sums
            aux_loss = self.accelerator.gather(scores.aux_loss.detach())
            self._metrics[self._mode]["aux_loss"].append(aux_loss.mean().item())

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, outputs.labels
