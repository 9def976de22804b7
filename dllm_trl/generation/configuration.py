"""Generation parameters of diffusion language models: checked, saved to and loaded from `generation_config.json`."""

import copy
import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
from transformers import GenerationConfig
from transformers.utils import logging

from ..types import Grid
from .samplers import SAMPLERS, parameters, with_parameters
from .samplers.common import built
from .schedules import SCHEDULES


logger = logging.get_logger(__name__)

# Names that other code bases use for what we have too
RENAMED = {
    "block_size": "block_length",
    "canvas_length": "block_length",
    "gen_len": "max_new_tokens",
    "gen_length": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "max_gen_length": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "max_token": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_gen_len": "min_new_tokens",
    "steps_per_block": "denoising_steps",
    "denoising_steps_per_block": "denoising_steps",
    "max_denoising_steps": "denoising_steps",
    "diffusion_steps": "denoising_steps",
    "num_diffusion_steps": "denoising_steps",
    "num_inference_steps": "denoising_steps",
    "timesteps": "denoising_steps",
    "remasking": "remasking_strategy",
    "alg": "remasking_strategy",
    "mask_id": "mask_token_id",
    "mask_token": "mask_token_id",
    "cfg": "cfg_scale",
    "guidance_scale": "cfg_scale",
    "further_horizon": "refresh_interval",
    "logits_eos_inf": "suppress_eos",
    "ignore_eos": "suppress_eos",
    "stopping_criteria_idx": "eos_token_id",
    "eos_id": "eos_token_id",
    "eot_token": "eos_token_id",
    "stop_token": "eos_token_id",
    "stop_token_id": "eos_token_id",
    "stop_words": "stop_strings",
    "topk": "top_k",
    "topp": "top_p",
    "generation_logits_hook_func": "logits_processor",
    "prompt": "input_ids",
    "idx": "input_ids",
    "return_dict": "return_dict_in_generate",
}
RENAMED |= {name: field.name for field in parameters().values() for name in field.metadata.get("elsewhere", ())}
_BEAMS = "it is of beam search, which is not defined for diffusion decoding"
_ASSISTED = "it is of assisted decoding, and there is no assistant here: a step commits several tokens by itself"
_SCORES = (
    "scores of a step are `(masked tokens, V)` and not kept; `return_dict_in_generate=True` gives `logprobs` and "
    "`step_map` of all tokens"
)
_LAYERS = "what is inside the forwards of a run is not kept; call the model on `canvas_ids`"
_ENCODER = "it is of encoder-decoder models"
_CACHE = "the engine keeps a cache of its own; full attention chooses one with `cache`"
_COMPILE = "the engine has forwards of its own"
# Options of transformers that decoding by diffusion does not have, and why
REFUSED = {
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "diversity_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "low_memory": _BEAMS,
    "use_mtp": _ASSISTED,
    "is_assistant": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "speculation_type": _ASSISTED,
    "output_scores": _SCORES,
    "output_logits": _SCORES,
    "output_attentions": _LAYERS,
    "output_hidden_states": _LAYERS,
    "forced_bos_token_id": _ENCODER,
    "decoder_start_token_id": _ENCODER,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "compile_config": _COMPILE,
    "continuous_batching_config": "`generate_rollouts(num_slots=)` refills slots that end",
    "prefill_chunk_size": "a prompt is computed in one forward",
    "guidance_scale": "use `cfg_scale` (full attention)",
    "penalty_alpha": "contrastive search compares the states of tokens that are decoded one after the other",
    "dola_layers": "it contrasts the layers of a next-token prediction",
    "token_healing": "it shortens the prompt; do so before the call",
    "remove_invalid_values": "a model with NaN or infinite logits is broken, and its confidences with it",
}
# Arguments of transformers' `generate` that are not supported
ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "encoder_outputs",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
)
# Options that are accepted and change nothing, and why that is right
WITHOUT_EFFECT = {
    "use_cache": "block families decode with a cache that changes no result; full attention chooses with `cache`",
    "disable_compile": "nothing is compiled",
    "renormalize_logits": "drawing normalises, and recorded log-probabilities come before the filters",
    "bos_token_id": "a prompt is never empty, and is taken as it is",
    "transformers_version": "says who wrote a file",
    "_from_model_config": "says where a config came from",
}
# Names that other code bases use for what is done differently here, and what to do instead
DIFFERENT = {
    "steps": "use `denoising_steps`, which are those of a block; LLaDA's `steps` is the total, which "
    "`denoising_steps_per_block` converts",
    "dual_cache": 'use `cache="dual"`',
    "use_block_cache": 'leave it out; full-attention families take `cache="prefix"` or `cache="dual"`',
    "block_past_key_values": "leave it out; decoding keeps its own cache",
    "replace_position": 'leave it out; `cache="dual"` keeps the keys and values around the block',
    "store_kv": "leave it out; decoding commits the keys and values of a block once it is full",
    "small_block_size": "leave it out: a block is denoised as a whole. `block_length` is its width, and "
    "`confidence_threshold` says how many tokens a step commits",
    "eos_early_stop": "leave it out: a response always ends with the block in which `eos_token_id` is committed",
    "early_stop": "leave it out: a response always ends with the block in which `eos_token_id` is committed",
    "minimal_topk": "lower `denoising_steps`: a step commits at least `block_length / denoising_steps` tokens",
    "num_transfer_tokens": "use `denoising_steps`: a step commits at least `block_length / denoising_steps` tokens",
    "number_transfer_tokens": "use `denoising_steps`: a step commits at least `block_length / denoising_steps` tokens",
    "num_to_transfer": "use `denoising_steps`: a step commits at least `block_length / denoising_steps` tokens",
    "tokens_per_step": "use `denoising_steps`: a step commits at least `block_length / denoising_steps` tokens",
    "factor": "Fast-dLLM's factor decoding is not among the strategies. Use "
    '`remasking_strategy="low_confidence_dynamic"` with `confidence_threshold`',
    "editing_threshold": "committed tokens are not edited. Leave it out",
    "max_post_steps": "committed tokens are not edited. Leave it out",
    "expand_budget": "masks are not expanded into several. Leave it out",
    "confidence_eos_eot_inf": "EOS has the confidence that the model gives it. `suppress_eos=True` never samples it",
    "generation_tokens_hook_func": "pass a `streamer` with `put_draft`, which gets the block after every step",
    "output_history": "pass `return_dict_in_generate=True`: `step_map` has the step of every token, and "
    "`save_trace_html` draws it",
    "stochastic_transfer": 'use `remasking_strategy="random"`, or `alg_temp` for noise in the order of the tokens',
    "right_shift_logits": "leave it out: the model's config knows it (`logit_shift`)",
    "input_embeddings": "pass token ids as `input_ids`",
    "noise_schedule": "images are not decoded. For text see `denoising_schedule`",
    "noise_type": "images are not decoded. Leave it out",
    "uni_prompting": "images are not decoded. Leave it out",
    "eps": 'set it in the checkpoint\'s generation_config.json, where `denoising_schedule="dream"` reads it',
}
# Methods of published model classes
METHODS = (
    "diffusion_generate",
    "block_diffusion_generate",
    "mdm_sample",
    "batch_sample",
    "mmu_generate",
    "t2i_generate",
)
OWN = (
    "block_length",
    "denoising_steps",
    "remasking_strategy",
    "denoising_schedule",
    "mask_token_id",
    "seed",
    "cache",
    "refresh_interval",
    "cfg_scale",
    "alg_temp",
    "suppress_eos",
)
NUMBERS = {
    "alg_temp",
    "cfg_scale",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_time",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_h",
    "top_p",
    "typical_p",
}
TOKEN_IDS = {"begin_suppress_tokens", "eos_token_id", "forced_eos_token_id", "pad_token_id", "suppress_tokens"}
STOCK = set(vars(GenerationConfig()))
CACHES = ("exact", "none", "prefix", "dual")


def field_names() -> set[str]:
    """Fields of a [`DiffusionGenerationConfig`]."""
    return {*OWN, *parameters(), *STOCK}


def denoising_steps_per_block(total_steps: int, max_new_tokens: int, block_length: int | None = None) -> int:
    """
    LLaDA's `steps`, which are those of the whole response, as `denoising_steps`, which are those of a block.

    Args:
        total_steps (`int`):
            Denoising steps of the whole response.
        max_new_tokens (`int`):
            Length of the response.
        block_length (`int`, *optional*):
            Tokens denoised together, `None` for the whole response.

    Returns:
        `int`: steps per block.

    Raises:
        ValueError: the steps are no whole number per block, or a block has more steps than tokens.
    """
    for name, value in (("total_steps", total_steps), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be at least 1, an integer, but is {value!r}.")
    block_length = min(block_length or max_new_tokens, max_new_tokens)
    blocks = Grid(block_length, "response").count(max_new_tokens)
    steps, rest = divmod(total_steps, blocks)
    if rest:
        raise ValueError(
            f"`total_steps` ({total_steps}) must be a multiple of the number of blocks ({blocks} of `block_length` "
            f"{block_length} in `max_new_tokens` {max_new_tokens}): pass {max(steps, 1) * blocks} or "
            f"{(steps + 1) * blocks}."
        )
    if steps > block_length:
        raise ValueError(
            f"`total_steps` ({total_steps}) are {steps} per block of {block_length} tokens, but each step commits a "
            f"token: pass at most {blocks * block_length}."
        )
    return steps


def check_refused(config: GenerationConfig) -> None:
    """Raises if an option is set to something that decoding by diffusion does not do."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, reason in REFUSED.items():
        value = getattr(config, name, None)
        off = 1 if name == "guidance_scale" else defaults.get(name)
        if value and value != off:
            raise ValueError(
                f"`{name}={value!r}` is not supported by diffusion decoding: {reason}. Leave it out (in a "
                f"checkpoint's own parameters: `model.generation_config.{name} = None`)."
            )


def check_types(values: dict[str, Any]) -> None:
    """Raises for a number that is none, and token ids that are no integers. NaN fails the comparisons themselves."""
    numbers = NUMBERS | {name for name, field in parameters().items() if isinstance(field.default, float)}
    for name in numbers & values.keys():
        value = values[name]
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"`{name}` must be a number, but is {value!r}.")
    for name in TOKEN_IDS & values.keys():
        ids = np.asarray([] if values[name] is None else values[name])
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"`{name}` must be a token id or a list of them, integers, but is {values[name]!r}.")


def reject_renamed(values: dict[str, Any]) -> None:
    """Raises a `ValueError` that says what to use instead of an argument that other code bases have."""
    for name, value in values.items():
        if name == "guidance_scale" and (not value or value == 1):  # off
            continue
        if name in RENAMED:
            raise ValueError(f"`{name}` is not an argument here; use `{RENAMED[name]}`.")
        if name in DIFFERENT:
            raise ValueError(f"`{name}` is not an argument here: {DIFFERENT[name]}.")


class DiffusionGenerationConfig(GenerationConfig):
    r"""
    Parameters of [`DiffusionGenerationMixin.generate`]. Everything of [`~transformers.GenerationConfig`] that makes
    sense for a diffusion language model (`max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    special tokens, ...) keeps its name and meaning.

    Args:
        block_length (`int`, *optional*):
            Tokens denoised together. `None` takes the model's `config.block_size`, which full attention does not have:
            there it is the whole response.
        denoising_steps (`int`, *optional*):
            Upper bound of denoising steps *per block*. `None` takes `block_length`.
        remasking_strategy (`str` or `Callable`, *optional*):
            Which masked tokens are committed in a step: `"sequential"`, `"low_confidence_static"`,
            `"low_confidence_dynamic"`, `"random"`, `"entropy"`, `"margin"`, `"entropy_bound"`, `"bacd"`, or a function
            with the signature of those in `dllm_trl.generation.samplers`.
        parameters of the strategies (*optional*):
            By their names: the fields of the dataclasses in `dllm_trl.generation.samplers`, which
            `dllm_trl.generation.samplers.parameters()` lists. `None` takes the default that stands there.
        denoising_schedule (`str`, *optional*):
            Quota of a step: `"even"` (block width // steps, the remainder to the earliest steps) or `"dream"`
            (`int(masked * (1 - s / t))` on `linspace(1, 1e-3, steps + 1)`, what is left on the last step).
        mask_token_id (`int`, *optional*):
            Id of the mask token. `None` takes the model's `config.mask_token_id`. Never sampled.
        seed (`int`, *optional*):
            Seed of the sampling. `None` draws one from torch's default generator.
        cache (`str`, *optional*):
            `"exact"` for block families, which always decode with the exact cache. For full attention `"none"`
            (default), or one of Fast-dLLM's approximations: `"prefix"` computes the block and what follows it,
            `"dual"` the block only; the keys and values of all other tokens are those of the block's first step.
        refresh_interval (`int`, *optional*):
            With `cache="prefix"`: how many tokens beyond the block are computed in its later steps, and seen ("further
            horizon" of the reference rollouts). `None` computes and sees all of them.
        cfg_scale (`float`, *optional*):
            Guidance of full attention as LLaDA defines it: logits = u + (cfg_scale + 1) (c - u), where the prompt is
            masked in u. 0 is off.
        alg_temp (`float`, *optional*):
            Temperature of the choice of positions in `"low_confidence_static"`, `"margin"` and `"entropy"` (Dream):
            they are drawn without replacement from softmax(score / alg_temp). 0 takes the best.
        suppress_eos (`bool`, *optional*):
            Whether EOS has no probability: it is never sampled, and confidences are those of the other tokens (LLaDA's
            `logits_eos_inf`).

    Raises:
        ValueError: a value is out of its range, or an argument goes by another name here.
    """

    block_length: int | None
    denoising_steps: int | None
    remasking_strategy: str | Callable | None
    denoising_schedule: str | None
    mask_token_id: int | None
    seed: int | None
    cache: str | None
    refresh_interval: int | None
    cfg_scale: float | None
    alg_temp: float | None
    suppress_eos: bool | None

    def __init__(self, **kwargs):
        reject_renamed(kwargs)
        unknown = sorted(key for key in kwargs.keys() - field_names() if not key.startswith("_"))
        if unknown:
            raise ValueError(f"`DiffusionGenerationConfig` got unknown arguments {unknown}; check their spelling.")
        for name in (*OWN, *parameters()):
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        check_types(vars(self))
        counts = {"block_length": 1, "denoising_steps": 1, "refresh_interval": 0, "max_new_tokens": 0, "max_length": 0}
        counts |= {"mask_token_id": 0, "seed": 0, "num_return_sequences": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < least):
                raise ValueError(f"`{name}` must be an integer of at least {least}, but is {value!r}.")
        strategy = self.remasking_strategy
        if strategy is not None and not callable(strategy) and strategy not in list(SAMPLERS):
            raise ValueError(
                f"`remasking_strategy` must be one of {sorted(SAMPLERS)} or a function, but is "
                f"{self.remasking_strategy!r}."
            )
        for sampler in with_parameters():
            built(sampler, vars(self))
        if self.denoising_schedule is not None and self.denoising_schedule not in SCHEDULES:
            raise ValueError(
                f"`denoising_schedule` must be one of {tuple(SCHEDULES)}, but is {self.denoising_schedule!r}."
            )
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(f"`cache` must be one of {CACHES}, but is {self.cache!r}.")
        if self.refresh_interval is not None and self.cache != "prefix":
            raise ValueError(
                f'`refresh_interval` says what `cache="prefix"` computes beyond the block, but `cache` is '
                f'{self.cache!r}; leave `refresh_interval` unset or pass `cache="prefix"`.'
            )
        for name in ("cfg_scale", "alg_temp"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 (0 is off), but is {value!r}.")
        if self.suppress_eos is not None and not isinstance(self.suppress_eos, bool):
            raise ValueError(f"`suppress_eos` must be `True` or `False`, but is {self.suppress_eos!r}.")
        self._validate_sampling()
        if self.num_beams is not None and self.num_beams > 1:
            raise ValueError("Beam search is not defined for diffusion language models: leave `num_beams` unset.")
        # Stock `validate` calls a temperature without `do_sample` a mistake, and refuses several return sequences
        # then. Here an explicit temperature samples, and `generate` resolves which of the two holds. It refuses
        # `max_new_tokens=0`, too, which here fills the masks of the prompt and adds nothing.
        stated = self.do_sample, self.max_new_tokens
        self.do_sample, self.max_new_tokens = True, self.max_new_tokens or None
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.do_sample, self.max_new_tokens = stated

    def _validate_sampling(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0 (0 is greedy), but is {self.temperature!r}.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 0):
            raise ValueError(f"`top_k` must be an integer of at least 0 (0 is off), but is {self.top_k!r}.")
        for name in ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], but is {value!r}.")
        for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"`{name}` must be an integer of at least 0 (0 is off), but is {value!r}.")
        for name in ("repetition_penalty", "encoder_repetition_penalty", "max_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value!r}.")

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {
            "max_new_tokens": 256,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "remasking_strategy": "low_confidence_dynamic",
            "denoising_schedule": "even",
            "cfg_scale": 0.0,
            "alg_temp": 0.0,
            "suppress_eos": False,
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(f"A generation config holds names and values, but this is {config_dict!r}.")
        # Published diffusion checkpoints carry `_from_model_config: true` in generation_config.json, which makes the
        # base class drop every key it does not know; and keys in the vocabulary of their own code, which we keep as
        # they are.
        names = field_names()
        foreign = {key: value for key, value in config_dict.items() if key not in names}
        config_dict = {key: value for key, value in config_dict.items() if key in names}
        config_dict.pop("_from_model_config", None)
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **known)
        unused |= kwargs
        for key, value in foreign.items():
            setattr(config, key, value)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_model_config(cls, model_config):
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        config = cls(**{name: values[name] for name in names if name in values}, _from_model_config=True)
        # transformers reads this hash to tell whether somebody touched the config by hand
        config._original_object_hash = hash(config)
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        strategy = self.remasking_strategy
        output["remasking_strategy"] = next((n for n, function in SAMPLERS.items() if function is strategy), strategy)
        return output

    def to_json_string(self, *args, **kwargs) -> str:
        # Hash, comparison and `repr` go by it
        strategy = self.to_dict()["remasking_strategy"]
        named = self._with(repr(strategy) if callable(strategy) else strategy)
        return super(DiffusionGenerationConfig, named).to_json_string(*args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike, *args, **kwargs) -> None:
        strategy = self.to_dict()["remasking_strategy"]
        if callable(strategy):
            logger.warning(
                f"`remasking_strategy` is a function of your own, {strategy!r}, which a file cannot hold: "
                f"`{json_file_path}` is written without it, and a model loaded from there decodes with the default. "
                "Set `model.generation_config.remasking_strategy` again after loading, or pass it to `generate`."
            )
            strategy = None
        super(DiffusionGenerationConfig, self._with(strategy)).to_json_file(json_file_path, *args, **kwargs)

    def _with(self, strategy: str | None) -> "DiffusionGenerationConfig":
        other = copy.copy(self)
        other.remasking_strategy = strategy
        return other
