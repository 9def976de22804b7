"""The trace of a rollout: which token was committed at which step, as JSON or as a page that plays it."""

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..types import DiffusionRollout


# A character has at most four bytes; twice that many tokens also cover neighbours whose pieces share tokens.
_MAX_SPAN = 8


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text of the one before it: some tokenizers write spaces only between tokens."""
    alone = [_decode(tokenizer, [i]) for i in ids]
    texts = alone[:1]
    for k in range(1, len(ids)):
        before, pair = alone[k - 1], _decode(tokenizer, ids[k - 1 : k + 1])
        follows = pair.startswith(before) and "\ufffd" not in before
        texts.append(pair[len(before) :] if follows else alone[k])
    return texts


def _character_spans(tokenizer, ids: list[int], texts: list[str]) -> list[list]:
    """`[start, end, text]` for neighbouring tokens that only together are whole characters (byte-level BPE)."""
    spans, start = [], 0
    while start < len(ids):
        end = start + 1
        if "\ufffd" in texts[start]:
            for stop in range(start + 2, min(start + _MAX_SPAN, len(ids)) + 1):
                text = _decode(tokenizer, ids[start:stop])
                if "\ufffd" not in text:
                    spans.append([start, stop, text])
                    end = stop
                    break
        start = end
    return spans


def _per_row(name: str, values: Sequence | torch.Tensor | None, rows: int) -> list:
    if values is None:
        return [None] * rows
    values = values.tolist() if torch.is_tensor(values) else list(values)
    if len(values) != rows:
        raise ValueError(
            f"`{name}` must have one entry for each of the {rows} rows of the rollout, but has {len(values)}."
        )
    return values


def trace_dict(
    rollout: DiffusionRollout,
    tokenizer,
    *,
    prompts: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    rewards: Sequence[float | None] | torch.Tensor | None = None,
) -> dict[str, Any]:
    r"""
    Returns a rollout as a dictionary of plain Python values that `json.dumps` accepts.

    Args:
        rollout ([`DiffusionRollout`] or [`DiffusionGenerateOutput`]):
            `B` decoded responses: of `generate_rollouts`, or of `generate` with `return_dict_in_generate=True`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Turns ids into text.
        prompts (`list[str]` of length `B`, *optional*):
            What to show as the prompts. Defaults to the decoded prompt ids, chat template and special tokens included.
        answers (`list[str | None]` of length `B`, *optional*):
            Reference answers.
        rewards (`list[float | None]` or `torch.Tensor` of length `B`, *optional*):
            Rewards of the responses. A reward that is not finite becomes `None`.

    Returns:
        `dict`: `block_length` and `samples`, one dictionary per row:

        - `prompt`, `completion` (`str`), `answer` (`str | None`), `reward` (`float | None`)
        - `num_forward_passes` (`int`): denoising forwards the row used
        - `ids`, `texts`, `steps`, `logprobs`: lists over the positions of the row's canvas; step -1, log-prob 0.0 and
          no text where nothing was committed
        - `completion_length` (`int`): positions from here on came after EOS; they were context, not response
        - `given` (`list[str]`): the prompt tokens that share the first block with the response (full attention: none).
          So position `j` of the canvas lies in block `(len(given) + j) // block_length`, counted from the first block
          of the response
        - `spans` (`list`): `[start, end, text]` for positions that only together are whole characters
    """
    rollout = getattr(rollout, "rollout", rollout)
    if not isinstance(rollout, DiffusionRollout):
        raise ValueError(
            "`rollout` must come from `generate_rollouts`, or from `generate` with `return_dict_in_generate=True`, "
            f"but is a {type(rollout).__name__}: token ids alone do not say when each was committed."
        )
    rows = len(rollout)
    prompts = _per_row("prompts", prompts, rows)
    answers = _per_row("answers", answers, rows)
    rewards = _per_row("rewards", rewards, rows)

    samples = []
    for row in range(rows):
        prompt_ids = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
        completion_ids = rollout.completion_ids[row][rollout.completion_mask[row].bool()].tolist()
        exists = rollout.canvas_mask[row].bool()
        ids = rollout.canvas_ids[row][exists].tolist()
        # One block of the prompt goes in front: it holds the tokens that share the response's first block and the
        # token that decides whether the next one starts with a space.
        context = prompt_ids[-rollout.grid.block_length :]
        texts = _token_texts(tokenizer, context + ids)
        shared = rollout.grid.offset(len(prompt_ids)) if rollout.grid.anchor == "prompt" else 0
        given = texts[len(context) - shared : len(context)]
        steps = rollout.step_map[row][exists].tolist()
        texts = [text if step >= 0 else "" for text, step in zip(texts[len(context) :], steps, strict=True)]
        reward = None if rewards[row] is None else float(rewards[row])
        samples.append(
            {
                "prompt": _decode(tokenizer, prompt_ids) if prompts[row] is None else str(prompts[row]),
                "completion": _decode(tokenizer, completion_ids),
                "answer": None if answers[row] is None else str(answers[row]),
                "reward": reward if reward is not None and math.isfinite(reward) else None,
                "num_forward_passes": int(rollout.num_forward_passes[row]),
                "completion_length": len(completion_ids),
                "given": given,
                "ids": ids,
                "texts": texts,
                "steps": steps,
                "logprobs": [round(x, 6) for x in rollout.logprobs[row][exists].tolist()],
                "spans": _character_spans(tokenizer, ids, texts),
            }
        )
    return {"block_length": rollout.grid.block_length, "samples": samples}


def trace_html(trace: dict[str, Any], title: str = "Denoising trace") -> str:
    r"""
    Returns the viewer with a trace in it: one HTML page that requests nothing from anywhere.

    Args:
        trace (`dict`):
            What [`trace_dict`] returned or [`save_trace_json`] wrote.
        title (`str`, *optional*, defaults to `"Denoising trace"`):
            Title of the page.
    """
    if not trace["samples"]:
        raise ValueError("`trace` holds no samples: there is nothing to show.")
    template = files(__package__).joinpath("trace_viewer.html").read_text(encoding="utf-8")
    payload = json.dumps({"title": title, **trace}, allow_nan=False)
    # In a script element only "<" can end the data early or open a comment; a JSON string may spell it as an escape.
    return template.replace("__TRACE__", payload.replace("<", "\\u003c"))


def save_trace_json(
    path: str | PathLike,
    rollout: DiffusionRollout,
    tokenizer,
    *,
    prompts: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    rewards: Sequence[float | None] | torch.Tensor | None = None,
) -> None:
    r"""
    Writes the trace of a rollout as JSON. The arguments after `path` are those of [`trace_dict`].
    """
    trace = trace_dict(rollout, tokenizer, prompts=prompts, answers=answers, rewards=rewards)
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def save_trace_html(
    path: str | PathLike,
    rollout: DiffusionRollout,
    tokenizer,
    *,
    prompts: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    rewards: Sequence[float | None] | torch.Tensor | None = None,
    title: str = "Denoising trace",
) -> None:
    r"""
    Writes a page that plays a rollout token by token. The arguments after `path` are those of [`trace_dict`], then
    `title` as for [`trace_html`].
    """
    trace = trace_dict(rollout, tokenizer, prompts=prompts, answers=answers, rewards=rewards)
    Path(path).write_text(trace_html(trace, title), encoding="utf-8")
