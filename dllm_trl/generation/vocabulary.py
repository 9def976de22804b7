"""Ids that no text holds: padding rows of an embedding that is wider than its tokenizer, codes of images."""

from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def suppressed_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Ids that a model never samples when it writes text.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `list[int]`: ids below `config.vocab_size` that `tokenizer` has no token for, and the family's
        `suppressed_token_ids`.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"`tokenizer` must be the model's tokenizer, but is {tokenizer!r:.80}.")
    unknown = np.setdiff1d(np.arange(config.vocab_size), list(tokenizer.get_vocab().values()))
    return sorted({*unknown.tolist(), *config.suppressed_token_ids})


def decode_texts(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], **kwargs: Any) -> list[str]:
    """Text of each row. Ids that `tokenizer` has no token for add nothing to it, where some tokenizers raise."""
    known = set(tokenizer.get_vocab().values())
    return tokenizer.batch_decode([[token for token in row if token in known] for row in rows], **kwargs)
