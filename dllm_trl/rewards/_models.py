"""Models that judge in this process: loaded when they are first asked."""

import functools
from collections.abc import Callable
from typing import Any

from ._chunks import load_tokenizer


def device_of(model: Any) -> Any:
    """Where its inputs go."""
    return next(model.parameters()).device


def load_model(auto_class: str, model: Any, tokenizer: Any, **options) -> Callable[[], tuple[Any, Any]]:
    """
    A function that returns the model, ready to judge, and its tokenizer, and loads them the first time where `model`
    is a name or folder; `auto_class` is a class of transformers.
    """
    if not isinstance(model, str) and tokenizer is None and not model.config.name_or_path:
        raise ValueError("`tokenizer` must be given with a `model` that was not loaded from a checkpoint.")

    @functools.cache
    def load() -> tuple[Any, Any]:
        import torch
        import transformers

        loaded = model
        if isinstance(model, str):
            loaded = getattr(transformers, auto_class).from_pretrained(model, dtype="auto", **options)
            if torch.accelerator.is_available():
                loaded.to(torch.accelerator.current_accelerator())
        reader = load_tokenizer(loaded.config.name_or_path if tokenizer is None else tokenizer)
        if reader.pad_token_id is None:
            reader.pad_token = reader.eos_token
        loaded.config.pad_token_id = reader.pad_token_id  # the last token that is none has the score, as in TRL
        return loaded.eval(), reader

    return load
