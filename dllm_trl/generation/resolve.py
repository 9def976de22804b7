"""From what a call, the checkpoint and the library say to one config in which every field is set."""

from typing import Any

import numpy as np
from transformers import GenerationConfig, WatermarkingConfig

from .checks import check_config
from .configuration import DiffusionGenerationConfig, check_refused, check_types, reject_renamed
from .samplers import parameters
from .vocabulary import suppressed_ids


LENGTHS = {"max_new_tokens", "max_length"}


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """What is set, without what transformers keeps to itself."""
    return {key: value for key, value in values.items() if value is not None and not key.startswith("_")}


def as_ids(value: Any) -> list[int]:
    return [] if value is None else np.atleast_1d(np.asarray(value)).tolist()


def resolve(
    model, generation_config: GenerationConfig | None, kwargs: dict[str, Any], tokenizer=None
) -> tuple[DiffusionGenerationConfig, dict[str, Any]]:
    """
    Call kwargs > passed config > the checkpoint's `generation_config.json` > the model's config > the library. Returns
    the config with every field set and the kwargs that are none of its fields. With a `tokenizer`, `suppress_tokens`
    has all ids that no text holds.
    """
    reject_renamed(kwargs)
    check_config(generation_config)
    config = DiffusionGenerationConfig()
    unknown = {key: value for key, value in kwargs.items() if not hasattr(config, key)}
    given = {key: value for key, value in kwargs.items() if key not in unknown}
    own = [settings(given), settings(vars(generation_config or config))]
    sources = [*own, settings(vars(model.generation_config)), settings(model.config.generation_defaults)]
    values = merge(sources, model.config.generation_synonyms)
    for key, value in translate(values, model.config, own[0].keys() | own[1].keys(), tokenizer).items():
        if getattr(config, key, None) is None:  # else a file names what is a method here
            setattr(config, key, value)
    check(config, model)
    return config, unknown


def merge(sources: list[dict[str, Any]], synonyms: tuple[set[str], ...]) -> dict[str, Any]:
    """Of all that name a value, the first source counts; of several names for one thing, those of the first source."""
    for source in sources:
        check_types(source)
    values = {}
    for source in (*sources, DiffusionGenerationConfig._get_default_generation_params()):
        taken = set().union(*(names for names in (LENGTHS, *synonyms) if names & values.keys()))
        values |= {key: value for key, value in source.items() if key not in values and key not in taken}
    # An explicit temperature without `do_sample` samples: the highest of the sources that names either one decides
    decisive = next((source for source in sources if source.keys() & {"do_sample", "temperature"}), {})
    do_sample = decisive.get("do_sample", decisive.get("temperature", 0) > 0)
    return values | {"do_sample": bool(do_sample) and values["temperature"] > 0}


def translate(values: dict[str, Any], model_config, named: set[str], tokenizer=None) -> dict[str, Any]:
    """
    Merged `values` in the words of this package, and from the model's config what they leave open. `named` are those
    that the caller named, not the checkpoint.
    """
    values = dict(model_config.translate_generation(values))
    for name, field in parameters(values["remasking_strategy"]).items():
        values.setdefault(name, field.default)
    values.setdefault("block_length", model_config.block_size)
    values.setdefault("denoising_steps", values["block_length"])
    values.setdefault("mask_token_id", model_config.mask_token_id)
    values.setdefault("eos_token_id", model_config.eos_token_id)
    if "pad_token_id" not in values:
        eos = [token for token in as_ids(values["eos_token_id"]) if token >= 0]
        values["pad_token_id"] = (eos or [0])[0] if model_config.pad_token_id is None else model_config.pad_token_id
    if tokenizer is not None:
        never = suppressed_ids(model_config, tokenizer)
    else:  # ids that the family never samples, unless the caller says which ones
        never = [] if "suppress_tokens" in named else model_config.suppressed_token_ids
    suppressed = values.get("suppress_tokens")
    values["suppress_tokens"] = sorted({*as_ids(suppressed), *never}) or suppressed
    values.setdefault("cache", "none" if model_config.diffusion_attention == "full" else "exact")
    if values["cache"] != "prefix" and "refresh_interval" not in named:
        values.pop("refresh_interval", None)  # the checkpoint's belongs to the checkpoint's cache
    if isinstance(values.get("watermarking_config"), dict):
        values["watermarking_config"] = WatermarkingConfig.from_dict(values["watermarking_config"])
    return values


def check(config: DiffusionGenerationConfig, model) -> None:
    """Raises for what the model's attention or decoding by diffusion cannot do, and for what is out of its range."""
    full, family = model.config.diffusion_attention == "full", type(model).__name__
    if full and config.cache == "exact":
        raise ValueError(
            f'`cache="exact"` is for block families: with full attention every new token changes the keys of all. '
            f'{family} takes "none", "prefix" or "dual".'
        )
    if not full and config.cache != "exact":
        raise ValueError(
            f"`cache={config.cache!r}` is for full-attention families. {family} decodes block by "
            "block with an exact cache; leave `cache` unset."
        )
    if not full and config.cfg_scale:
        raise ValueError(
            f"`cfg_scale` is for full-attention families; {family} caches its prompt. Leave `cfg_scale` unset."
        )
    check_refused(config)
    config.validate()


def check_vocabulary(config: DiffusionGenerationConfig, vocab_size: int) -> None:
    """Raises for ids that the model cannot have, and where no mask token is known."""
    if config.mask_token_id is None:
        raise ValueError(
            "The model's config has no `mask_token_id`. Set it there, or pass `mask_token_id=` to `generate`."
        )
    for name in ("mask_token_id", "suppress_tokens"):
        unknown = [token for token in as_ids(getattr(config, name)) if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"`{name}` has the id {unknown[0]}, but the model's vocabulary has the ids 0 to {vocab_size - 1}."
            )
