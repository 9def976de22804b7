"""What the entry points of decoding take, checked before anything is computed: each error says how to mend it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from .._compat import take_mixed_adapters
from .configuration import DiffusionGenerationConfig


def check_integer(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raises unless `value` is an integer of at least `least`, or `None` where that is `optional`."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        alternative = " or `None`" if optional else ""
        raise ValueError(f"`{name}` must be an integer of at least {least}{alternative}, but is {value!r}.")


def check_switch(name: str, value: Any, optional: bool = False) -> None:
    """Raises unless `value` is `True` or `False`, or `None` where that is `optional`."""
    if not isinstance(value, bool) and not (optional and value is None):
        choices = "`True`, `False` or `None`" if optional else "`True` or `False`"
        raise ValueError(f"`{name}` must be {choices}, but is {value!r}.")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def decodable(model: Any) -> Any:
    """The model that decodes: `model`, or what a [`~peft.PeftModel`] wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, type) or not hasattr(inner, "_resolve_generation_config"):
        wrapped = hasattr(getattr(inner, "module", None), "_resolve_generation_config")
        mend = (
            "pass what it wraps, `accelerator.unwrap_model(model)`"
            if wrapped
            else "load it with `AutoModelForCausalLM.from_pretrained` after `import dllm_trl`"
        )
        raise ValueError(f"`model` must be a diffusion language model with its head, but is {_shown(model)}: {mend}.")
    return inner


def check_one_adapter(model: Any, adapter_names: list[str] | None) -> None:
    """Raises if the rows of a batch are to go through different adapters."""
    names = take_mixed_adapters(model) if adapter_names is None else adapter_names
    if names is not None:
        raise ValueError(
            f"`adapter_names={_shown(names)}` is not supported by diffusion decoding, whose forwards do not hold the "
            "rows of the batch in order. Decode the rows of each adapter in a call of their own, after "
            "`model.set_adapter(name)`."
        )


def prompt_batch(
    inputs: torch.Tensor | Mapping | None, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`input_ids` `(B, P)` and their mask, also from the `BatchEncoding` that a tokenizer returns."""
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise ValueError(f"`input_ids` must be a tensor or a tokenizer's output, but is a dict of {list(inputs)}.")
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        inputs = inputs["input_ids"]
    if inputs is None:
        raise ValueError("`input_ids` is required: a LongTensor of shape (batch, prompt length).")
    for name, value in (("input_ids", inputs), ("attention_mask", attention_mask)):
        if not torch.is_tensor(value) and not (name == "attention_mask" and value is None):
            raise ValueError(
                f"`{name}` must be a tensor of shape (batch, prompt length), but is {_shown(value)}: call the "
                'tokenizer with `return_tensors="pt"` (and `padding=True` for several prompts).'
            )
    if inputs.dim() != 2:
        mend = "; pass `input_ids[None]` for one prompt" if inputs.dim() == 1 else ""
        raise ValueError(f"`input_ids` must have shape (batch, prompt length), but has {tuple(inputs.shape)}{mend}.")
    if attention_mask is not None and ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError(
            "`attention_mask` must hold 1 for tokens and 0 for padding, but has other values, too: "
            f"{_shown(attention_mask.unique().tolist())}."
        )
    if inputs.size(0) == 0:
        raise ValueError(f"`input_ids` holds no prompt: its shape is {tuple(inputs.shape)}. Pass at least one row.")
    return inputs, attention_mask


def token_ids(name: str, ids: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """`ids` of any integer type as int64. Raises for all else: to round a float would be to guess."""
    if torch.is_tensor(ids):
        kind = ids.dtype
        whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    else:
        ids = np.asarray(ids)
        kind, whole = ids.dtype, ids.dtype.kind in "iu" or not ids.size  # an empty list has no type
    if not whole:
        raise ValueError(f"{name} must hold token ids, which are integers, but is of type {kind}.")
    return ids.cpu().long().numpy() if torch.is_tensor(ids) else ids.astype(np.int64)


def prompt_lists(prompts: Any) -> Sequence:
    """`prompts` if it is a list of token ids per prompt."""
    example = "a list with the token ids of each prompt, `[[5, 9, 2], [7, 11]]`"
    if isinstance(prompts, Mapping):
        raise ValueError(f'`prompts` must be {example}, but is a dict of {list(prompts)}: pass its `["input_ids"]`.')
    if torch.is_tensor(prompts) or isinstance(prompts, np.ndarray):
        raise ValueError(
            f"`prompts` must be {example}, without padding, but is a tensor of shape {tuple(prompts.shape)}: pass "
            "`[row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]`."
        )
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"`prompts` must be {example}, but is {_shown(prompts)}.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty: pass at least one prompt.")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(
                f"`prompts[{i}]` must hold token ids, but is the text {_shown(prompt)}: pass "
                '`tokenizer(prompts)["input_ids"]`.'
            )
        if isinstance(prompt, Integral):
            raise ValueError(f"`prompts` must be {example}, but is one prompt, {_shown(prompts)}: pass `[prompt]`.")
        if not isinstance(prompt, Sequence) and not torch.is_tensor(prompt) and not isinstance(prompt, np.ndarray):
            raise ValueError(f"`prompts[{i}]` must be a list of token ids, but is {_shown(prompt)}.")
        one_dimensional = prompt.ndim == 1 if hasattr(prompt, "ndim") else all(_is_id(token) for token in prompt)
        if not one_dimensional:
            raise ValueError(f"`prompts[{i}]` must be a flat list of token ids, integers, but is {_shown(prompt)}.")
    return prompts


def _is_id(token: Any) -> bool:
    # 64 bits, as in a tensor; 0-dimensional tensors come out of iterating over a tensor
    return isinstance(token, Integral | torch.Tensor) and not isinstance(token, bool) and abs(int(token)) < 2**63


def row_limits(max_new_tokens: Any, rows: int) -> list[int]:
    """`max_new_tokens` of every row."""
    if isinstance(max_new_tokens, Integral) and not isinstance(max_new_tokens, bool):
        check_integer("max_new_tokens", max_new_tokens, 1)
        return [int(max_new_tokens)] * rows
    if torch.is_tensor(max_new_tokens) or isinstance(max_new_tokens, np.ndarray):
        max_new_tokens = max_new_tokens.tolist()
    if isinstance(max_new_tokens, str) or not isinstance(max_new_tokens, Sequence):
        raise ValueError(
            f"`max_new_tokens` must be an integer of at least 1, or a list with one per prompt, but is "
            f"{max_new_tokens!r}."
        )
    if len(max_new_tokens) != rows:
        raise ValueError(
            f"`max_new_tokens` must be one number, or a list with one per prompt ({rows}), but has "
            f"{len(max_new_tokens)}."
        )
    for i, limit in enumerate(max_new_tokens):
        check_integer(f"max_new_tokens[{i}]", limit, 1)
    return [int(limit) for limit in max_new_tokens]


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each of which says something or calls a tool."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, Mapping)
            and message.get("role")
            and (isinstance(message.get("content"), str | list | Mapping) or "tool_calls" in message)
            for message in value
        )
    )


@contextmanager
def naming_template(name: str) -> Iterator[None]:
    """Context in which an error of a chat template says that it is the one of the tokenizer of that name."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"`{name}.chat_template` cannot be rendered ({type(error).__name__}: {error}). Mend it, or "
            "set another one."
        ) from error


def check_config(generation_config: Any) -> None:
    """Raises unless it is a generation config, or `None`."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be a `DiffusionGenerationConfig` or a `GenerationConfig`, but is "
            f"{generation_config!r}: build one, `DiffusionGenerationConfig(temperature=0.7)`."
        )


def check_siblings(name: str, number: int, config: DiffusionGenerationConfig) -> None:
    """Raises for several responses to a prompt without sampling: they would be one and the same."""
    if number > 1 and not config.do_sample:
        raise ValueError(
            f"`{name}` ({number}) > 1 needs sampling, since greedy responses to one prompt are all the same: set "
            f"`do_sample=True` or a `temperature` above 0, or `{name}=1`."
        )


def check_masks(
    name: str, prompts: list[np.ndarray], config: DiffusionGenerationConfig, model_config, fills: bool
) -> None:
    """Raises for a mask token in a prompt, unless the caller `fills` it and the model can: by full attention."""
    for i, prompt in enumerate(prompts):
        places = (prompt == config.mask_token_id).nonzero()[0]
        if not len(places):
            continue
        found = f"{name}[{i}] holds the mask token (id {config.mask_token_id}) at position {places[0]} of its tokens"
        if model_config.diffusion_attention != "full":
            raise ValueError(
                f"{found}: `{model_config.model_type}` decodes block after block and never comes back to a prompt, so "
                "it cannot fill it; `generate` of a family with full attention does. Leave masks out of the prompt."
            )
        if not fills:
            raise ValueError(
                f"{found}: a rollout tells when the tokens of the response were committed, not those of the prompt. "
                "Fill the prompt with `model.generate(..., max_new_tokens=0)` first, or leave masks out of it."
            )
        if config.cache != "none":
            raise ValueError(
                f"{found}, which `cache={config.cache!r}` cannot fill: it keeps the prompt's keys. Set "
                '`cache="none"`, or leave masks out of the prompt.'
            )
        if model_config.logit_shift and places[0] == 0:
            raise ValueError(
                f"{found}: `{model_config.model_type}` predicts each token at the one before it (`logit_shift`), and "
                "nothing comes before the first. Put a token in front, such as BOS."
            )
