"""What the objectives of supervised fine-tuning share: the rows they corrupt, their random draws, their loss."""

from collections.abc import Callable
from dataclasses import fields
from typing import Protocol

import torch

from ...types import Round
from .ar import AutoregressiveObjective
from .block import BlockObjective
from .random_mask import RandomMaskObjective
from .semi_ar import SemiAutoregressiveObjective
from .trace_sft import TraceSFTObjective


class SFTObjective(Protocol):
    r"""
    What an objective of supervised fine-tuning is: a callable, plain function or dataclass.

    It gets rows as [`unpack_rows`] gives them, with random numbers `levels` and `uniform`, and the block length
    (`None`: full attention), and returns the [`Round`]s to train on, weights included. All randomness comes from those
    numbers.

    What an objective may also have:

    - `num_levels(batch, block_length) -> (B,)`: how many `levels` each row needs. Without it, each row gets one.
    - `attentions`: the kinds of attention it is for, of `"block"` and `"full"`. Without it, any.
    - `loss_norm`: what its loss is divided by where the config leaves that open. Without it, `"token"`.
    - `fills = False`: it does not train EOS tokens that fill up a sequence.
    - `causal = True`: scored tokens are predicted from the clean tokens before them; nothing is masked.
    - `step_map = "required"` or `"optional"`: it reads the dataset's column `step_map`, as `batch["step_map"]`.
    """

    def __call__(self, batch: dict[str, torch.Tensor], block_length: int | None) -> list[Round]: ...


SFT_OBJECTIVES: dict[str, Callable[..., SFTObjective]] = {
    "ar": AutoregressiveObjective,
    "block": BlockObjective,
    "random_mask": RandomMaskObjective,
    "semi_ar": SemiAutoregressiveObjective,
    "trace": TraceSFTObjective,
}
DEFAULT_OBJECTIVES = {"block": "block", "full": "random_mask"}
TURN_END = 4  # tokens among which a document's EOS may lie: templates put a line break after it


def make_sft_objective(objective: str | SFTObjective | None, attention: str | None = None, **options) -> SFTObjective:
    """
    The objective of that name, built with those of `options` that it has; anything else than a name is returned as it
    is. `attention` is the model's kind, which the objective must be for; `None` as objective is the kind's default.
    """
    chosen = DEFAULT_OBJECTIVES[attention] if objective is None else objective
    if not callable(chosen):
        if chosen not in SFT_OBJECTIVES:
            raise ValueError(
                f"`objective` must be a callable or one of {sorted(SFT_OBJECTIVES)}, but is {objective!r}."
            )
        kind = SFT_OBJECTIVES[chosen]
        if getattr(kind, "needs_block_length", False) and options.get("block_length") is None:
            raise ValueError(f"`objective={chosen!r}` needs `block_length`, the tokens of a slice, e.g. 32.")
        chosen = kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})
    attentions = getattr(chosen, "attentions", None)
    if attention is not None and attentions is not None and attention not in attentions:
        fitting = [name for name, kind in SFT_OBJECTIVES.items() if attention in kind.attentions]
        raise ValueError(
            f"`objective={objective!r}` is for models with {' or '.join(attentions)} attention, but `model` has "
            f"{attention} attention. Use one of {fitting}."
        )
    return chosen


def num_levels(objective: SFTObjective, batch: dict[str, torch.Tensor], block_length: int | None) -> torch.Tensor:
    """Noise levels that each row needs, `(B,)`."""
    if hasattr(objective, "num_levels"):
        return objective.num_levels(batch, block_length)
    return batch["scored"].any(1).long()


def stratify(uniform: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    r"""
    Antithetic noise levels: one in each of n equal strata of [0, 1), so that a batch covers all levels evenly.

    Args:
        uniform (`torch.Tensor` of shape `(n,)`):
            Uniform in [0, 1).
        order (`torch.LongTensor` of shape `(n,)`):
            Stratum of each: a permutation. A random one, or levels would grow along the sequence.
    """
    return (uniform + order) / max(len(uniform), 1)


def unpack_rows(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    block_length: int = 1,
    fill_token_id: int | None = None,
    fill_to: int | None = None,
    eos_token_ids: torch.Tensor | None = None,
    step_map: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    A batch of TRL's collator as prompts and canvases, one row per document, packed ones included.

    Everything before the first trained token is the prompt. The first token of a document is never trained: nothing
    is generated without a context.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`):
            Tokens.
        labels (`torch.LongTensor` of shape `(B, S)`):
            The tokens again, -100 where they are not trained.
        attention_mask (`torch.LongTensor` of shape `(B, S)`, *optional*):
            1 for tokens, 0 for padding.
        position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
            Used without `attention_mask`: a 0 begins a document.
        block_length (`int`, *optional*, defaults to `1`):
            Tokens denoised together.
        fill_token_id (`int`, *optional*):
            Fills the last block of documents that end in it; the fill is trained. `None`: no fill.
        fill_to (`int`, *optional*):
            Fills documents that end up to this many tokens, instead of up to the end of their last block.
        eos_token_ids (`torch.LongTensor`, *optional*):
            A document ends if its last block (with `fill_to`: its last few tokens) has a trained token of these.
        step_map (`torch.LongTensor` of shape `(B, S)`, *optional*):
            Step at which each token was committed, -1 for those that never were, which are not trained. The response
            then begins with the first token that was committed.

    Returns:
        `dict[str, torch.Tensor]`: `prompt_ids`, `prompt_mask` `(D, P)`, `canvas_ids`, `canvas_mask`, `scored` (what is
        trained) and `source` `(D, R)`, the index into the flat `(B * S)` tokens, -1 for fill and padding; `step_map`
        `(D, R)` where one was given.
    """
    device = input_ids.device
    if not ((labels == input_ids) | (labels == -100)).all():
        raise ValueError("`labels` must be `input_ids` or -100: a diffusion model predicts the token itself.")
    if attention_mask is not None:
        real = attention_mask.bool()
        row = torch.arange(len(input_ids), device=device).unsqueeze(1).expand_as(input_ids)
        position = attention_mask.long().cumsum(1) - 1
    else:
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=device).expand_as(input_ids)
        position = position_ids
        row = ((position == 0).flatten().cumsum(0) - 1).view_as(position)

    # One row per document, one column per position.
    documents, length = int(row.max()) + 1, max(int(position.max()) + 1, fill_to or 0)
    length = -(-length // block_length) * block_length
    source = torch.full((documents, length), -1, device=device)
    source[row[real], position[real]] = real.flatten().nonzero().flatten()
    ids = input_ids.flatten()[source.clamp(min=0)]
    exists = source >= 0
    scored = exists & (labels.flatten()[source.clamp(min=0)] != -100)
    scored[:, 0] = False
    steps = None
    if step_map is not None:
        steps = step_map.flatten()[source.clamp(min=0)].masked_fill(~exists, -1)
        scored = scored & (steps >= 0)
    columns = torch.arange(length, device=device).expand_as(ids)

    if fill_token_id is not None:
        size = exists.sum(1, keepdim=True)
        if fill_to is None:
            last = (size - 1).clamp(min=0) // block_length * block_length
            end = last + block_length
        else:
            last, end = (size - TURN_END).clamp(min=0), fill_to
        ends = scored & (columns >= last) & torch.isin(ids, eos_token_ids.to(device))
        fill = ends.any(1, keepdim=True) & (columns >= size) & (columns < end)
        ids, exists, scored = ids.masked_fill(fill, fill_token_id), exists | fill, scored | fill

    begun = scored if steps is None else scored | (steps >= 0)
    start = torch.where(begun.any(1), begun.long().argmax(1), exists.sum(1)).unsqueeze(1)
    prompt, response = int(start.max()), max(int((exists.sum(1, keepdim=True) - start).max()), 1)
    shifted = start + torch.arange(response, device=device)
    inside = shifted < length
    shifted = shifted.clamp(max=length - 1)
    rows = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": (columns < start)[:, :prompt].long(),
        "canvas_ids": ids.gather(1, shifted),
        "canvas_mask": (exists.gather(1, shifted) & inside).long(),
        "scored": scored.gather(1, shifted) & inside,
        "source": source.gather(1, shifted).masked_fill(~inside, -1),
    }
    if steps is not None:
        rows["step_map"] = steps.gather(1, shifted).masked_fill(~inside, -1)
    return rows


def longest_document(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens of the longest document of a batch of TRL's collator, a scalar on its device."""
    if attention_mask is not None:
        return attention_mask.sum(1).max()
    return input_ids.new_tensor(input_ids.size(1)) if position_ids is None else position_ids.max() + 1


def sft_loss(
    nll: torch.Tensor,
    weight: torch.Tensor,
    row: torch.Tensor,
    num_trained: torch.Tensor,
    loss_norm: str = "token",
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""
    The weighted negative log-likelihood of a batch.

    Args:
        nll (`torch.Tensor` of shape `(n,)`):
            Negative log-likelihoods of the scored tokens.
        weight (`torch.Tensor` of shape `(n,)`):
            Their weights.
        row (`torch.LongTensor` of shape `(n,)`):
            Their rows.
        num_trained (`torch.LongTensor` of shape `(B,)`):
            Tokens that are trained in each row, scored this time or not.
        loss_norm (`str`, *optional*, defaults to `"token"`):
            `"token"`: the sum over all trained tokens of the batch. `"sequence"`: each row's sum over its own trained
            tokens, averaged over rows. `"batch"`: the sum over the number of rows.
        num_items (`torch.Tensor` or `int`, *optional*):
            Trained tokens (rows, for `"sequence"` and `"batch"`) of the whole accumulated batch of all processes.
            `None` counts those of this batch.
    """
    total = nll * weight
    if loss_norm == "sequence":
        total = total / num_trained[row]
    if num_items is None:
        num_items = num_loss_items(num_trained, loss_norm)
    return total.sum() / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def num_loss_items(num_trained: torch.Tensor, loss_norm: str) -> torch.Tensor:
    """What `loss_norm` divides by: trained tokens, or rows that have any."""
    return num_trained.sum() if loss_norm == "token" else (num_trained > 0).sum()
