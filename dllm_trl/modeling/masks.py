"""Who attends to whom, in the form that each attention implementation takes."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    find_packed_sequence_indices,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dllm_trl.types import Grid


SDPA_PLAN = "sdpa_plan"


def pad_free_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Positions counted from the first real token.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`):
            1 for tokens, 0 for padding.

    Returns:
        `torch.LongTensor` of shape `(B, S)`, 0 for padding on the left.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def block_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    block_length: int,
) -> torch.Tensor | BlockMask:
    """
    Earlier tokens and the whole own block, in the form of `config`'s attention implementation.

    Args:
        config (`PreTrainedConfig`):
            Says which attention implementation the mask is for.
        inputs_embeds (`torch.Tensor` of shape `(B, S, H)`):
            Embeddings of the queries.
        attention_mask (`torch.Tensor` of shape `(B, past + S)`, *optional*):
            1 for tokens, 0 for padding, which nobody sees. Without mask and cache, positions that do not follow each
            other start a new sequence, as everywhere in transformers.
        position_ids (`torch.LongTensor` of shape `(B or 1, S)`):
            Positions of the queries without padding: token `i` belongs to block `i // block_length`.
        past_key_values (`Cache`, *optional*):
            Committed tokens. They lie before the queries, so all of them are visible.
        block_length (`int`):
            Tokens per block.
    """
    batch, length = inputs_embeds.shape[:2]
    blocks = Grid(block_length).block(position_ids.expand(batch, -1))
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if attention_mask is not None:
        blocks = blocks.masked_fill(attention_mask[:, past : past + length] == 0, -1)
    elif past_key_values is None and (sequences := find_packed_sequence_indices(position_ids)) is not None:
        blocks = blocks + sequences * (blocks.max() + 1)  # block 0 of one sequence is not block 0 of the next
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=F.pad(blocks, (past, 0), value=-1),
    )


def adapt_mask(mask: torch.Tensor, implementation: str, dtype: torch.dtype, batch_size: int):
    """
    Make a 4D boolean mask mean the same in every attention implementation.

    Args:
        mask (`torch.Tensor` of shape `(1 or B, 1 or heads, Q, K)`):
            `True` (or a nonzero integer) = may attend. A floating-point mask is returned as it is: it is added to the
            attention scores.
        implementation (`str`):
            Attention implementation of the model.
        dtype (`torch.dtype`):
            What eager attention computes in.
        batch_size (`int`):
            B.
    """
    if mask.is_floating_point():
        return mask
    mask = mask.bool()
    if implementation == "eager":  # which adds its mask, so True would become a bonus of 1
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if implementation == "flex_attention":
        mask = mask.expand(batch_size, -1, -1, -1)
        heads = mask.shape[1]

        def mask_mod(batch, head, query, key):
            return mask[batch, head if heads > 1 else 0, query, key]

        return create_block_mask(mask_mod, batch_size, heads if heads > 1 else None, *mask.shape[2:], mask.device)
    return mask


def sdpa_plan_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    plan=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Stock SDPA, or with a `plan` a few segments of queries at a time, each against its own keys only.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query (`torch.Tensor` of shape `(B, heads, S, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(B, kv_heads, S, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(B, kv_heads, S, head_dim)`):
            Values.
        attention_mask (`torch.Tensor`, *optional*):
            Mask of stock SDPA, ignored with a plan.
        dropout (`float`, *optional*, defaults to `0.0`):
            Attention dropout.
        scaling (`float`, *optional*):
            Factor of the attention scores.
        plan ([`AttentionPlan`], *optional*):
            Sizes of the segments, the segments each one sees, and the boolean masks.

    Returns:
        Attention output of shape `(B, S, heads, head_dim)`, and no weights.
    """
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    # One split each, so that the backward pass has one concatenation each.
    queries, keys, values = (torch.split(x, plan.sizes, dim=2) for x in (query, key, value))
    outputs = []
    for segment, visible, mask in zip(queries, plan.keys, plan.masks, strict=True):
        segment_key = torch.cat([keys[i] for i in visible], dim=2)
        segment_value = torch.cat([values[i] for i in visible], dim=2)
        enable_gqa = mask is None or query.device.type == "cpu"
        if not enable_gqa:  # with a mask CUDA would fall back to its slow kernel
            segment_key, segment_value = repeat_kv(segment_key, groups), repeat_kv(segment_value, groups)
        output = F.scaled_dot_product_attention(
            segment,
            segment_key,
            segment_value,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(SDPA_PLAN, sdpa_plan_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA_PLAN, sdpa_mask)
