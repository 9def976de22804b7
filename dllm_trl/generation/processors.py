"""What a generation config wants done to logits, with transformers' own processors."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)

from .samplers import SAMPLERS


# Options that change which token is sampled, and the value that switches each off
OFF = {
    "top_h": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "sequence_bias": {},
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_eos_token_id": [],
    "exponential_decay_length_penalty": [],
    "begin_suppress_tokens": [],
    "watermarking_config": None,
}
# Filters of a distribution, in transformers' order: they act when sampling
WARPERS = {
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


def is_on(config, name: str) -> bool:
    """Whether the option of that name changes what is sampled."""
    value = getattr(config, name)
    return value is not None and value != OFF[name]


def is_filtered(config) -> bool:
    """Whether any option makes the distribution that tokens are drawn from another one than the model's."""
    return any(is_on(config, name) for name in OFF)


def make_warpers(config) -> LogitsProcessorList:
    """Filters that look at the scores only."""
    names = [name for name in WARPERS if config.do_sample and is_on(config, name)]
    return LogitsProcessorList(WARPERS[name](getattr(config, name)) for name in names)


class _OfPrompt(LogitsProcessor):
    """A processor of transformers that looks at the prompt, which each row has its own of."""

    def __init__(self, kind: Callable[[Any, torch.Tensor], LogitsProcessor], value):
        self.kind, self.value = kind, value

    def __call__(self, input_ids, scores, prompt_ids, batch_id):
        return self.kind(self.value, prompt_ids)(input_ids, scores)


class _AllowedTokens(LogitsProcessor):
    """`prefix_allowed_tokens_fn`, which is asked once per row: only the next token will be committed."""

    def __init__(self, function: Callable[[int, torch.Tensor], list[int]]):
        self.function = function

    def __call__(self, input_ids, scores, prompt_ids, batch_id):
        allowed = list(self.function(batch_id, input_ids[0]))
        if not allowed:
            raise ValueError(
                f"`prefix_allowed_tokens_fn` allows no token after {input_ids.size(1)} tokens of row {batch_id}. "
                "Return at least one, EOS for example."
            )
        banned = torch.ones_like(scores, dtype=torch.bool)
        banned[:, allowed] = False
        return scores.masked_fill(banned, -torch.inf)


def _biases(config) -> dict[tuple[int, ...], float]:
    """`sequence_bias` as a dict, which JSON cannot hold: there it is a list of pairs."""
    bias = config.sequence_bias
    pairs = bias.items() if isinstance(bias, dict) else bias
    return {tuple(tokens): float(value) for tokens, value in pairs}


def _left_to_right(config) -> bool:
    """Whether tokens are committed one by one from left to right, so that all before the next one is known."""
    width = config.block_length or config.max_new_tokens or config.max_length
    in_order = config.remasking_strategy in ("sequential", SAMPLERS["sequential"])
    return in_order and config.denoising_schedule == "even" and (config.denoising_steps or width) >= width


def _check_order(config, prefix_allowed_tokens_fn, infills: bool) -> None:
    """Raises if an option speaks of what stands before a token, but tokens are committed in another order."""
    if _left_to_right(config) and not infills:
        return
    phrases = {
        "sequence_bias": is_on(config, "sequence_bias") and any(len(tokens) > 1 for tokens in _biases(config)),
        "bad_words_ids": is_on(config, "bad_words_ids") and any(len(tokens) > 1 for tokens in config.bad_words_ids),
        "no_repeat_ngram_size": is_on(config, "no_repeat_ngram_size"),
        "encoder_no_repeat_ngram_size": (config.encoder_no_repeat_ngram_size or 0) > 1,
        "watermarking_config": is_on(config, "watermarking_config"),
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn is not None,
    }
    for name, given in phrases.items():
        if given:
            value = "" if name == "prefix_allowed_tokens_fn" else f"={getattr(config, name)!r}"
            raise ValueError(
                f"`{name}{value}` goes by the tokens before the next one, but tokens are committed in another order, "
                "several at a time, and what stands before one may come later. Leave it out (single tokens in "
                '`bad_words_ids` and `sequence_bias` work in any order), or pass `remasking_strategy="sequential"` '
                'with `denoising_schedule="even"`, `denoising_steps` of at least the block\'s length, and no masks in '
                "the prompt."
            )


def make_processors(
    config, eos: torch.Tensor, prefix_allowed_tokens_fn: Callable | None, infills: bool = False
) -> LogitsProcessorList:
    """Processors that look at the row's tokens, in transformers' order."""
    _check_order(config, prefix_allowed_tokens_fn, infills)
    processors = LogitsProcessorList()
    if is_on(config, "sequence_bias"):
        processors.append(SequenceBiasLogitsProcessor(_biases(config)))
    if is_on(config, "encoder_repetition_penalty"):
        penalty = float(config.encoder_repetition_penalty)
        processors.append(_OfPrompt(EncoderRepetitionPenaltyLogitsProcessor, penalty))
    if is_on(config, "repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
    if is_on(config, "no_repeat_ngram_size"):
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if is_on(config, "encoder_no_repeat_ngram_size"):
        processors.append(_OfPrompt(EncoderNoRepeatNGramLogitsProcessor, config.encoder_no_repeat_ngram_size))
    if is_on(config, "bad_words_ids"):
        processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if prefix_allowed_tokens_fn is not None:
        processors.append(_AllowedTokens(prefix_allowed_tokens_fn))
    return processors


def make_place_rules(config, eos: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """
    What depends on where a token stands, for each masked position by itself: `(scores (n, V), place in the response
    (n,), place in the row without padding (n,), whether it is the last one (n,)) -> scores`. `None` if there is none.
    """
    names = ("min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty")
    if not any(is_on(config, name) for name in (*names, "begin_suppress_tokens")):
        return None
    forced = torch.as_tensor(config.forced_eos_token_id if is_on(config, "forced_eos_token_id") else []).reshape(-1)
    first = torch.as_tensor(config.begin_suppress_tokens or [], dtype=torch.long, device=eos.device)
    start, factor = config.exponential_decay_length_penalty or (0, 1.0)
    forced = forced.long().to(eos.device)

    def apply(scores: torch.Tensor, place: torch.Tensor, position: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        scores, place = scores.clone(), place[:, None]
        early = (place < (config.min_new_tokens or 0)) | (position[:, None] < (config.min_length or 0))
        scores[:, eos] = scores[:, eos].masked_fill(early, -torch.inf)
        if len(forced):
            scores = scores.masked_fill(last[:, None], -torch.inf)
            scores[:, forced] = scores[:, forced].masked_fill(last[:, None], 0.0)
        growth = factor ** (place - start).clamp(min=0).float() - 1
        # A token that cannot be sampled stays so
        scores[:, eos] += (scores[:, eos].abs() * growth).masked_fill(~scores[:, eos].isfinite(), 0.0)
        scores[:, first] = scores[:, first].masked_fill(place == 0, -torch.inf)
        return scores

    return apply


def make_watermark(config, vocab_size: int, device: torch.device) -> LogitsProcessorList:
    """The watermark, which comes after everything else."""
    mark = config.watermarking_config
    if mark is None:
        return LogitsProcessorList()
    if not isinstance(mark, WatermarkingConfig):
        raise ValueError(
            f"`watermarking_config` must be a `WatermarkingConfig`, but is a `{type(mark).__name__}`, which keeps a "
            "state per step of left-to-right decoding. Leave it out."
        )
    return LogitsProcessorList([mark.construct_processor(vocab_size, device)])
