import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from ..modeling.packing import PackedRounds, pack_causal
from ..types import Round
from .chat_template import mark_assistant
from .checks import (
    check_eos,
    check_kind,
    check_model,
    check_peft,
    check_precision,
    check_router_loss,
    fill_task_type,
    find_mask_token,
)
from .exact_resume import ExactResumeMixin
from .metrics import RatioMetricsMixin, new_notes
from .model_card import DiffusionModelCardMixin
from .neftune import draw_noise
from .objectives.sft import (
    DEFAULT_OBJECTIVES,
    longest_document,
    make_sft_objective,
    num_levels,
    num_loss_items,
    sft_loss,
    stratify,
    unpack_rows,
)
from .papers import PAPERS
from .published_checkpoints import PublishedCheckpointMixin
from .round_packing import pack_batch
from .sft_config import DiffusionSFTConfig
from .sft_data import (
    SampleLengthsCollator,
    StepMapCollator,
    check_columns,
    check_step_maps,
    check_tokens,
    prepare_step_maps,
)
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
            check_columns("train_dataset", train_dataset, args.dataset_text_field)
            check_columns("eval_dataset", eval_dataset, args.dataset_text_field)
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
        self.loss_norm = args.loss_norm or getattr(self.objective, "loss_norm", "token")
        name = args.objective or DEFAULT_OBJECTIVES[config.diffusion_attention]
        self._paper = PAPERS.get(name, {}) if isinstance(name, str) else {}
        self._step_map = getattr(self.objective, "step_map", None)
        if self._step_map == "required":
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

        if self._step_map is not None:
            self.data_collator = StepMapCollator(self.data_collator, self._step_map == "required")
        if self.padding_free:
            self.data_collator = SampleLengthsCollator(self.data_collator)
        self._notes = new_notes()
        self.neftune_noise_alpha = None  # stock noise would know neither rows nor copies: see `compute_loss`
        config = self.model.config
        config.use_cache = use_cache  # `Trainer` switches it off, and the checkpoints would say so
        check_tokens("train_dataset", self.train_dataset, config.vocab_size)
        check_tokens("eval_dataset", self.eval_dataset, config.vocab_size)
        full = config.diffusion_attention == "full"
        self.block_length = args.block_length or config.block_size
        self._grid = None if full else self.block_length
        self.mask_token_id = find_mask_token(config, self._tokenizer)
        self._fill_token_id = self._find_fill(full)
        # A chat template may end turns with another token than the tokenizer's EOS: decoding stops at all of these.
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self._eos_token_ids = torch.tensor([i for i in [*stops, self._tokenizer.eos_token_id] if i is not None])
        limit = config.max_position_embeddings
        for name in ("max_length", "eos_fill_length"):
            value = getattr(args, name)
            if value is not None and value > limit:
                logger.warning(
                    f"`{name}={value}` allows sequences longer than the model's context of {limit} tokens. Set "
                    f"`{name}={limit}`."
                )

    def _find_fill(self, full: bool) -> int | None:
        """The token that fills up sequences that end, `None` if nothing does."""
        fills = getattr(self.objective, "fills", True)
        if self.args.eos_fill and not fills:
            raise ValueError(
                f"`eos_fill=True` does not go with `objective={self.args.objective!r}`, which trains no padding. Set "
                "`eos_fill=None`."
            )
        if self.args.eos_fill_length is not None and not full:
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
        if self._step_map is None or "step_map" not in get_dataset_column_names(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return prepare_step_maps(prepare, dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._step_map is not None and "step_map" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "step_map"]

    # ---------------------------------------------------------------------------------------------------- corruption

    def _rows(self, inputs: dict[str, torch.Tensor], fill_to: int | None = None) -> dict[str, torch.Tensor]:
        fill_to = fill_to or self.args.eos_fill_length
        fills = self._grid is not None or fill_to is not None
        return unpack_rows(
            inputs["input_ids"],
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            block_length=self._grid or 1,
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
        if self._grid is not None or self._fill_token_id is None or self.args.eos_fill_length is not None:
            return None
        lengths = [longest_document(b["input_ids"], b.get("attention_mask"), b.get("position_ids")) for b in batches]
        return int(self.accelerator.gather(torch.stack(lengths).max().to(device)).max())

    def _levels(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        uniform = torch.rand(count, generator=generator)
        return stratify(uniform, torch.randperm(count, generator=generator)) if self.args.antithetic else uniform

    def _corrupt(self, rows: dict[str, torch.Tensor], levels: torch.Tensor, uniform: torch.Tensor) -> list[Round]:
        device = rows["canvas_ids"].device
        batch = {**rows, "levels": levels.to(device), "uniform": uniform.to(device)}
        return self.objective(batch, self._grid)

    def _corrupt_by_content(self, rows: dict[str, torch.Tensor]) -> list[Round]:
        """Each row draws from a generator of its own, seeded by what the row holds."""
        levels, uniform = [], []
        counts = zip(
            num_levels(self.objective, rows, self._grid).tolist(), rows["scored"].sum(1).tolist(), strict=True
        )
        for (num, trained), ids, exists in zip(counts, rows["canvas_ids"], rows["canvas_mask"], strict=True):
            generator = _generator(self.args.seed, zlib.crc32(ids[exists.bool()].cpu().numpy().tobytes()))
            levels.append(self._levels(num, generator))
            uniform.append(torch.rand(trained, generator=generator))
        return self._corrupt(rows, torch.cat(levels), torch.cat(uniform))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        longest = self._longest(batches, device)
        all_rows = [self._rows(batch, longest) for batch in batches]
        needs = [
            (
                num_levels(self.objective, rows, self._grid).sum(),
                rows["scored"].sum(),
                num_loss_items(rows["scored"].sum(1), self.loss_norm),
            )
            for rows in all_rows
        ]
        needs = torch.tensor(needs, device=device)  # (accumulation steps, 3)
        # In the order in which one process would have met the batches: by accumulation step, then by process.
        needs = self.accelerator.gather(needs[None]).transpose(0, 1).reshape(-1, 3).cpu()
        totals, ends = needs.sum(0).tolist(), needs.cumsum(0)

        generator = _generator(self.args.seed, self.state.global_step)
        levels, uniform = self._levels(totals[0], generator), torch.rand(totals[1], generator=generator)
        for step, rows in enumerate(all_rows):
            place = step * self.accelerator.num_processes + self.accelerator.process_index
            (level_end, token_end, _), (num, trained, _) = ends[place].tolist(), needs[place].tolist()
            rounds = self._corrupt(rows, levels[level_end - num : level_end], uniform[token_end - trained : token_end])
            batches[step]["corruption"] = (rows, rounds)
        if not self.args.average_tokens_across_devices:
            own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
            totals = needs[own].sum(0).tolist()
        return batches, torch.tensor(totals[2], device=device)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _pack(self, rows: dict[str, torch.Tensor], rounds: list[Round]) -> PackedRounds:
        if not getattr(self.objective, "causal", False):
            return pack_batch(self, rows, rounds)
        canvas = [rows[name] for name in ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_mask")]
        return pack_causal(*canvas, rounds[0].scored)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "corruption" in inputs:
            rows, rounds = inputs["corruption"]
        else:
            rows = self._rows(self._without_repeats(inputs))
            rounds = self._corrupt_by_content(rows)
        packed = self._pack(rows, rounds)
        model_inputs = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "plan": packed.plan,
            "score_index": packed.score_index,
            "use_cache": False,
        }
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        if model.training and self.args.neftune_noise_alpha is not None:
            alpha, hidden_size = self.args.neftune_noise_alpha, self.model.config.hidden_size
            model_inputs["embedding_noise"] = draw_noise(
                packed, rows, alpha, hidden_size, self.args.seed, self.state.global_step
            )
        outputs = model(**model_inputs, shift_labels=packed.labels[None], fused_lm_head=True)

        nll = -outputs.log_probs[0]
        if self.args.loss_type == "dft":
            nll = nll * outputs.log_probs[0].exp().detach()
        weights = [torch.ones_like(r.scored, dtype=nll.dtype) if r.weight is None else r.weight for r in rounds]
        weight = torch.stack(weights)[packed.index].to(nll.device) if rounds else torch.ones_like(nll)
        num_trained = rows["scored"].sum(1)
        loss = sft_loss(nll, weight, packed.index[1], num_trained, self.loss_norm, num_items_in_batch)
        self._record(inputs, outputs, loss.detach(), num_loss_items(num_trained, self.loss_norm))
        # As in TRL: the normaliser counts all processes, over which DDP averages the gradients
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        if not return_outputs:
            return loss
        with torch.no_grad():
            logits = model(**model_inputs).logits[0]
        source = rows["source"][packed.index[1:]]
        known = source >= 0  # fill has no place in the batch
        scores = logits.new_zeros(inputs["input_ids"].numel(), logits.size(-1))
        scores[source[known]] = logits[known]
        labels = torch.full_like(inputs["input_ids"], -100).flatten()
        labels[source[known]] = packed.labels[known]
        shape = inputs["input_ids"].shape
        return loss, DiffusionSFTOutput(logits=scores.view(*shape, -1), labels=labels.view(shape))

    def _record(self, inputs: dict[str, torch.Tensor], outputs, loss: torch.Tensor, num_items: torch.Tensor) -> None:
        """TRL's metrics, over the scored tokens. `loss` is a mean over `num_items` in evaluation."""
        scored = outputs.label_mask.sum()
        sums = {"entropy": (outputs.entropy.detach().sum(), scored)}
        sums["mean_token_accuracy"] = (outputs.is_top1.sum().float(), scored)
        if self._mode == "eval":
            sums["loss"] = (loss * num_items, num_items)
        else:
            mask = inputs.get("attention_mask")
            tokens = torch.tensor(inputs["input_ids"].size(1), device=loss.device) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.reduce(tokens, "sum").item()
        self._note_ratios(sums)
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:  # of what shares a micro-batch: there is no ratio of sums
            aux_loss = self.accelerator.gather(outputs.aux_loss.detach())
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


def _generator(*seeds: int) -> torch.Generator:
    """A generator whose numbers have nothing to do with those of neighbouring seeds."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))
