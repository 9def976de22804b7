"""`model.generate` for diffusion language models, with the arguments, checks and return values of transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file

from ..types import DiffusionRollout
from .checks import (
    check_integer,
    check_masks,
    check_one_adapter,
    check_siblings,
    check_switch,
    decodable,
    prompt_batch,
    prompt_lists,
    row_limits,
    token_ids,
)
from .configuration import ARGUMENTS, METHODS, DiffusionGenerationConfig
from .decoder import DecodingSettings
from .engine import decode
from .forward import execution_device
from .processors import make_place_rules, make_processors, make_warpers, make_watermark
from .resolve import as_ids, check_vocabulary, resolve
from .samplers import make_sampler
from .schedules import make_quotas
from .stopping import Stopping, deadline


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    r"""
    Output of [`DiffusionGenerationMixin.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B, P+R)`):
            Prompt, its masks filled, and response, padded with `pad_token_id` after EOS.
        canvas_ids (`torch.LongTensor` of shape `(B, R)`):
            The row's context, also what was committed after EOS in EOS's block and, with full attention, mask tokens
            that were never decoded; `pad_token_id` elsewhere.
        canvas_mask (`torch.LongTensor` of shape `(B, R)`):
            1 where the position existed for the row.
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Denoising step (from 0) at which each token was committed, -1 where nothing was.
        logprobs (`torch.FloatTensor` of shape `(B, R)`):
            Log-softmax over the whole vocabulary of logits / temperature of each committed token when it was
            committed, before processors and filters (temperature 1 when greedy); 0 where nothing was.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Denoising forwards whose result the row used.
        tokens_per_forward (`float`):
            Committed tokens / denoising forwards, over the batch.
        rollout ([`DiffusionRollout`]):
            The same with the prompts and the blocks: what [`~generation.trace_viewer.save_trace_html`] draws.
    """

    sequences: torch.LongTensor | None = None
    canvas_ids: torch.LongTensor | None = None
    canvas_mask: torch.LongTensor | None = None
    step_map: torch.LongTensor | None = None
    logprobs: torch.FloatTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: float | None = None
    rollout: DiffusionRollout | None = None


class DiffusionGenerationMixin(GenerationMixin):
    """Puts block diffusion decoding behind `generate`. Mixed into the `*ForCausalLM` class of every family."""

    generation_config_class = DiffusionGenerationConfig

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in METHODS:
                raise
            raise AttributeError(
                f"`{name}` is a method of the published code; use `model.generate`, whose arguments "
                "`DiffusionGenerationConfig` lists."
            ) from error

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        # The stock method loads generation_config.json into the stock class, which knows none of the diffusion fields.
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            options = {
                "cache_dir": cache_dir,
                "force_download": force_download,
                "proxies": proxies,
                "local_files_only": local_files_only,
                "token": token,
                "revision": revision,
                "subfolder": subfolder,
            }
            try:
                cached_file(pretrained_model_name_or_path, GENERATION_CONFIG_NAME, **options)
            except OSError:
                return  # no generation_config.json: the one made from the model's config stays
            try:
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                    **options,
                    **kwargs,
                )
            except (OSError, TypeError, ValueError) as error:
                raise ValueError(
                    f"`{GENERATION_CONFIG_NAME}` of `{pretrained_model_name_or_path}` cannot be used: {error} Mend "
                    "the file, or remove it to decode with the defaults."
                ) from error

    def _resolve_generation_config(
        self, generation_config: GenerationConfig | None, tokenizer=None, **kwargs
    ) -> tuple[DiffusionGenerationConfig, dict[str, Any]]:
        return resolve(self, generation_config, kwargs, tokenizer)

    def _decoding_settings(
        self,
        config: DiffusionGenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer=None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        shape: tuple[int, int] = (1, 0),
        infills: bool = False,
    ) -> DecodingSettings:
        """The parameters of one run, whose batch has a `shape` (rows, width of the prompts) and may hold masks."""
        device = execution_device(self)
        check_vocabulary(config, self.config.vocab_size)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.max_time is not None:
            criteria.append(MaxTimeCriteria(config.max_time))
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` needs the tokenizer: pass `tokenizer=`.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        seed = config.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        eos_token_ids = [token for token in as_ids(config.eos_token_id) if token >= 0]
        suppressed = {config.mask_token_id, *as_ids(config.suppress_tokens)}
        never = suppressed | set(eos_token_ids if config.suppress_eos else [])
        if not never.isdisjoint(as_ids(config.forced_eos_token_id)):
            raise ValueError(
                f"`forced_eos_token_id={config.forced_eos_token_id!r}` forces a token that `suppress_tokens`, "
                "`suppress_eos` or `mask_token_id` forbid. Leave one of them out."
            )
        eos = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
        processors = make_processors(config, eos, prefix_allowed_tokens_fn, infills)
        return DecodingSettings(
            block_length=config.block_length,
            quotas=make_quotas(config.denoising_schedule, config.denoising_steps, vars(config)),
            sampler=make_sampler(config.remasking_strategy, vars(config)),
            temperature=config.temperature if config.do_sample else 0.0,
            warpers=make_warpers(config),
            place_rules=make_place_rules(config, eos),
            processors=LogitsProcessorList([*processors, *(logits_processor or [])]),
            watermark=make_watermark(config, self.config.vocab_size, device),
            stopping=Stopping(criteria, *shape, config.pad_token_id),
            deadline=deadline(criteria),
            suppressed=torch.tensor(sorted(suppressed), device=device),
            suppress_eos=config.suppress_eos,
            alg_temp=config.alg_temp,
            cfg_scale=config.cfg_scale,
            cache=config.cache,
            refresh_interval=config.refresh_interval,
            mask_token_id=config.mask_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_ids=np.array(eos_token_ids, dtype=np.int64),
            seed=seed,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | BatchEncoding | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer=None,
        attention_mask: torch.Tensor | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        **kwargs,
    ) -> torch.LongTensor | DiffusionGenerateOutput:
        r"""
        Generates responses by block diffusion: blocks of `block_length` tokens left to right, each denoised in at most
        `denoising_steps` forwards. Block families keep an exact key/value cache; full attention computes the whole
        row in every step, or takes an approximate `cache`. See [`Decoder`] for the loop.

        Args:
            inputs or input_ids (`torch.LongTensor` of shape `(B, P)`, or [`~transformers.BatchEncoding`]):
                Prompts, left-padded where `attention_mask` is 0; or what a tokenizer returned, with its mask. With
                full attention, mask tokens in a prompt are filled in place, as part of the first block.
            generation_config ([`~transformers.GenerationConfig`], *optional*):
                Parameters; keyword arguments win over it, it wins over the checkpoint's `generation_config.json`.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Called per row with `(n, length)` ids (the row's prompt and committed tokens, once per masked position)
                and
                `(n, V)` scores.
            stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*):
                Called per row at the end of a block; the row ends there, or with a stop string after that. A time
                limit (also `max_time`) is looked at after every step: all rows end as they are, and a response is what
                was committed from its start without a gap. Of several rows each has its own copy of the lists, dicts
                and tensors that a criterion keeps.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Receives the prompt, then each finished block (`put`), and after each step the block being denoised
                (`put_draft`, if it has one). One prompt at a time.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*):
                1 for tokens, 0 for padding. Without it a prompt's leading `pad_token_id` are padding, unless that is
                an EOS token.
            prefix_allowed_tokens_fn (`Callable`, *optional*):
                As in transformers. Tokens must be committed from left to right, one by one.
            kwargs:
                Fields of [`DiffusionGenerationConfig`], and `tokenizer`: for `stop_strings`, and so that no id is
                sampled that it has no token for. Without it the rows of an embedding that is wider than its
                tokenizer are sampled like all others.

        Returns:
            [`DiffusionGenerateOutput`] or `torch.LongTensor` of shape `(B, P+R)`: prompt and response.

        Raises:
            ValueError: an argument is unknown, out of range, or not defined for diffusion decoding.
        """
        inputs = kwargs.pop("input_ids", inputs)
        check_one_adapter(self, kwargs.pop("adapter_names", None))
        for name in ARGUMENTS:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not supported by diffusion decoding; leave it out.")
        inputs, attention_mask = prompt_batch(inputs, attention_mask)
        inputs = torch.from_numpy(token_ids("`input_ids`", inputs)).to(inputs.device)
        kwargs.pop("synced_gpus", None)  # accepted for transformers' callers
        tokenizer = kwargs.pop("tokenizer", None)
        config, unused = self._resolve_generation_config(generation_config, tokenizer, **kwargs)
        if unused:
            raise ValueError(f"`generate` got unknown arguments {sorted(unused)}; check their spelling.")
        if attention_mask is None:
            attention_mask = _inferred_mask(inputs, config)
        if attention_mask.shape != inputs.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(inputs.shape)}, but has "
                f"{tuple(attention_mask.shape)}."
            )
        if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
            raise ValueError("`attention_mask` must be left-padded: 0s, then 1s. Set `padding_side='left'`.")
        limit = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - inputs.size(1)
        prompts = [row[mask] for row, mask in zip(inputs.cpu().numpy(), attention_mask.bool().cpu().numpy())]
        check_masks("input_ids", prompts, config, self.config, fills=True)
        infills = any((prompt == config.mask_token_id).any() for prompt in prompts)
        if limit < 0 or (limit == 0 and not infills):
            length = "max_length" if config.max_new_tokens is None else "max_new_tokens"
            raise ValueError(
                f"`{length}` ({getattr(config, length)}) leaves no room after a prompt of {inputs.size(1)} tokens, "
                "which holds no mask to fill either; pass `max_new_tokens` of at least 1."
            )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"`streamer` must have the methods `put` and `end`, but is {streamer!r}.")
        if streamer is not None and inputs.size(0) * config.num_return_sequences > 1:
            raise ValueError("`streamer` works with one prompt and one response at a time.")
        if streamer is not None and infills:
            raise ValueError(
                "`streamer` receives the prompt before its mask tokens are filled. Leave `streamer` out, or masks."
            )
        self._check_prompts(prompts, [limit] * len(prompts))
        check_siblings("num_return_sequences", config.num_return_sequences, config)
        shape = len(inputs) * config.num_return_sequences, inputs.size(1)
        settings = self._decoding_settings(
            config, logits_processor, stopping_criteria, tokenizer, prefix_allowed_tokens_fn, shape, infills
        )
        if streamer is not None:
            streamer.put(inputs.cpu())
        rollout = decode(
            self, prompts, [limit] * len(prompts), settings, config.num_return_sequences, streamer=streamer
        )
        if streamer is not None:
            streamer.end()
        rollout = rollout.to(inputs.device)
        expanded = inputs.repeat_interleave(config.num_return_sequences, dim=0)
        filled = expanded.clone()
        filled[attention_mask.bool().repeat_interleave(config.num_return_sequences, dim=0).to(filled.device)] = (
            rollout.prompt_ids[rollout.prompt_mask.bool()]
        )
        sequences = torch.cat([filled, rollout.completion_ids], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return DiffusionGenerateOutput(
            sequences=sequences,
            canvas_ids=rollout.canvas_ids,
            canvas_mask=rollout.canvas_mask,
            step_map=rollout.step_map,
            logprobs=rollout.logprobs,
            num_forward_passes=rollout.num_forward_passes,
            tokens_per_forward=rollout.tokens_per_forward,
            rollout=rollout,
        )

    def _check_prompts(self, prompts: list[np.ndarray], limits: list[int]) -> None:
        context = self.config.max_position_embeddings
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if len(prompt) == 0:
                raise ValueError(f"Prompt {i} is empty: a prompt needs at least one token.")
            if len(prompt) + limit > context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens and `max_new_tokens` is {limit}: more than the model's "
                    f"context of {context}. Shorten the prompt or lower `max_new_tokens`."
                )
            unknown = prompt[(prompt < 0) | (prompt >= self.config.vocab_size)]
            if len(unknown):
                raise ValueError(
                    f"Prompt {i} holds the id {unknown[0]}, but the model's vocabulary has the ids 0 to "
                    f"{self.config.vocab_size - 1}. Tokenize it with the model's own tokenizer."
                )


def _inferred_mask(inputs: torch.Tensor, config: DiffusionGenerationConfig) -> torch.Tensor:
    """Padding of a batch that came without a mask. As in transformers, a pad token that ends texts says nothing."""
    if config.pad_token_id is None or config.pad_token_id in as_ids(config.eos_token_id):
        return torch.ones_like(inputs)
    return (inputs != config.pad_token_id).long().cummax(dim=1).values


def rollout_inputs(
    model,
    prompts: list[list[int]],
    generation_config: GenerationConfig | None = None,
    num_generations: int = 1,
    max_new_tokens: int | list[int] | None = None,
    num_slots: int | None = None,
    seed: int | None = None,
    index_offset: int = 0,
    fused: bool | None = None,
    tokenizer=None,
) -> tuple[Any, list[np.ndarray], list[int], DiffusionGenerationConfig]:
    """
    The arguments of [`generate_rollouts`], checked: the model that decodes, the ids and the limit of each prompt, and
    the config with every field set.
    """
    model = decodable(model)
    prompts = prompt_lists(prompts)
    check_integer("num_generations", num_generations, 1)
    check_integer("num_slots", num_slots, 1, optional=True)
    check_integer("index_offset", index_offset, 0)
    check_switch("fused", fused, optional=True)
    limits = None if max_new_tokens is None else row_limits(max_new_tokens, len(prompts))
    given = {} if seed is None else {"seed": seed}
    if limits is not None:
        given["max_new_tokens"] = max(limits)
    config, _ = model._resolve_generation_config(generation_config, tokenizer, **given)
    if config.num_return_sequences not in (1, num_generations):
        raise ValueError(
            f"`num_return_sequences={config.num_return_sequences}` is `generate`'s; here it is `num_generations`, "
            f"which is {num_generations}. Leave `num_return_sequences` out."
        )
    check_siblings("num_generations", num_generations, config)
    if limits is None:
        if config.max_new_tokens is None:
            raise ValueError("`max_length` is ambiguous for ragged prompts; pass `max_new_tokens`.")
        limits = row_limits(config.max_new_tokens, len(prompts))
    arrays = [token_ids(f"`prompts[{i}]`", prompt) for i, prompt in enumerate(prompts)]
    model._check_prompts(arrays, limits)
    check_masks("prompts", arrays, config, model.config, fills=False)
    return model, arrays, limits, config


def generate_rollouts(
    model,
    prompts: list[list[int]],
    generation_config: GenerationConfig | None = None,
    num_generations: int = 1,
    max_new_tokens: int | list[int] | None = None,
    num_slots: int | None = None,
    seed: int | None = None,
    index_offset: int = 0,
    fused: bool | None = None,
    show_progress: bool = False,
    tokenizer=None,
    record_entropies: bool = False,
) -> DiffusionRollout:
    r"""
    Many ragged prompts through a fixed number of slots: a slot takes the next row as soon as its row ends, and the
    prompt of a group is computed once.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A diffusion language model.
        prompts (`list[list[int]]`):
            Token ids, without padding. Equal prompts share one prefill.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Parameters, over those of the checkpoint.
        num_generations (`int`, *optional*, defaults to `1`):
            Responses per prompt, adjacent in the result.
        max_new_tokens (`int` or `list[int]`, *optional*):
            Limit of all rows, or one per prompt; `None` takes the config's.
        num_slots (`int`, *optional*):
            Rows in flight at a time, `None` for all. Changes speed and memory, never results.
        seed (`int`, *optional*):
            Row `j` of prompt `i` draws from (seed, index_offset + i, j). `None` draws a seed from torch's default
            generator.
        index_offset (`int`, *optional*, defaults to `0`):
            Index of the first prompt, for callers that hold a part of a larger batch.
        fused (`bool`, *optional*):
            Forces the fused (`True`) or the stock (`False`) decode forward; `None` picks.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar: rows that are done, tokens per second, tokens per forward.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's: for `stop_strings`, and so that no id is sampled that it has no token for.
        record_entropies (`bool`, *optional*, defaults to `False`):
            Whether the result has `entropies`.

    Returns:
        [`DiffusionRollout`]: on CPU, rows in the order of the prompts.
    """
    check_switch("record_entropies", record_entropies)
    model, arrays, limits, config = rollout_inputs(
        model,
        prompts,
        generation_config,
        num_generations,
        max_new_tokens,
        num_slots,
        seed,
        index_offset,
        fused,
        tokenizer,
    )
    shape = len(arrays) * num_generations, max(map(len, arrays))
    settings = model._decoding_settings(config, tokenizer=tokenizer, shape=shape)
    settings = replace(settings, record_entropies=record_entropies)
    return decode(
        model, arrays, limits, settings, num_generations, num_slots, index_offset, fused, show_progress=show_progress
    )
