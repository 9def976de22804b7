"""Documents of a fine-tuning batch as rows: prompts and the responses to them."""

import torch

from ..types import Grid, Rows


TURN_END = 4  # tokens among which a document's EOS may lie: templates put a line break after it


def unpack_rows(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    grid: Grid,
    fill_token_id: int | None = None,
    fill_to: int | None = None,
    eos_token_ids: torch.Tensor | None = None,
    step_map: torch.Tensor | None = None,
) -> tuple[Rows, torch.Tensor]:
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
        grid ([`Grid`]):
            Where the blocks of a document lie.
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
        [`Rows`] of `D` documents, and `torch.LongTensor` of shape `(D, R)`: where in the flat `(B * S)` tokens each
        response token comes from, -1 for fill and padding.
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
    if grid.attention == "block":
        length = grid.ceil(length)
    source = torch.full((documents, length), -1, device=device)
    source[row[real], position[real]] = real.flatten().nonzero().flatten()
    ids = input_ids.flatten()[source.clamp(min=0)]
    exists = source >= 0
    trained = exists & (labels.flatten()[source.clamp(min=0)] != -100)
    trained[:, 0] = False
    steps = None
    if step_map is not None:
        steps = step_map.flatten()[source.clamp(min=0)].masked_fill(~exists, -1)
        trained = trained & (steps >= 0)
    columns = torch.arange(length, device=device).expand_as(ids)

    if fill_token_id is not None:
        size = exists.sum(1, keepdim=True)
        if fill_to is None:
            last = grid.floor((size - 1).clamp(min=0))
            end = grid.ceil(last + 1)
        else:
            last, end = (size - TURN_END).clamp(min=0), fill_to
        ends = trained & (columns >= last) & torch.isin(ids, eos_token_ids.to(device))
        fill = ends.any(1, keepdim=True) & (columns >= size) & (columns < end)
        ids, exists, trained = ids.masked_fill(fill, fill_token_id), exists | fill, trained | fill

    begun = trained if steps is None else trained | (steps >= 0)
    start = torch.where(begun.any(1), begun.long().argmax(1), exists.sum(1)).unsqueeze(1)
    prompt, response = int(start.max()), max(int((exists.sum(1, keepdim=True) - start).max()), 1)
    shifted = start + torch.arange(response, device=device)
    inside = shifted < length
    shifted = shifted.clamp(max=length - 1)
    rows = Rows(
        prompt_ids=ids[:, :prompt],
        prompt_mask=(columns < start)[:, :prompt].long(),
        canvas_ids=ids.gather(1, shifted),
        canvas_mask=(exists.gather(1, shifted) & inside).long(),
        grid=grid,
        trained=trained.gather(1, shifted) & inside,
        step_map=None if steps is None else steps.gather(1, shifted).masked_fill(~inside, -1),
    )
    return rows, source.gather(1, shifted).masked_fill(~inside, -1)


def longest_document(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens of the longest document of a batch of TRL's collator, a scalar on its device."""
    if attention_mask is not None:
        return attention_mask.sum(1).max()
    return input_ids.new_tensor(input_ids.size(1)) if position_ids is None else position_ids.max() + 1
