"""
A decode forward of our own over the model's parameters, for plain llama-like decoders (Qwen3, Qwen3-MoE, Qwen2,
Llama): one projection for queries, keys and values, residual and gate folded into the matrix products, keys and values
written in place, and after the last layer's keys and values only the tokens that need logits are carried on.
"""

import torch
from torch import nn

from ..types import Grid
from .cache import Prefix, SlotCache
from .fused_ops import Layer, Matrix, Norm


# Layers whose arithmetic is known here, each with its attention
LAYERS = {f"{family}DecoderLayer": {f"{family}Attention"} for family in ("Qwen3", "Qwen3Moe", "Qwen2", "Llama")}
LAYERS["LlamaDecoderLayer"].add("LLaDAAttention")  # rotates in float32, as the tables' type says
STATIC_ROPE = {"default", "linear", "yarn", "llama3"}


class FusedForward:
    """See the module's docstring. Holds packed copies of the weights on CPU: build a new one after they changed."""

    def __init__(self, model: nn.Module):
        self.backbone = model.base_model
        self.layers = [Layer(layer) for layer in self.backbone.layers]
        self.norm, self.head = Norm(self.backbone.norm), Matrix(model.get_output_embeddings())
        self.cos = self.sin = None
        self.shift = model.config.logit_shift

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether `model` is as its class made it: known layers, plain float parameters, no hooks, no adapters."""
        backbone, config, layers = model.base_model, model.config, getattr(model.base_model, "layers", [])
        return (
            len(layers) > 0
            and all(type(layer.self_attn).__name__ in LAYERS.get(type(layer).__name__, ()) for layer in layers)
            and type(model.get_output_embeddings()) is nn.Linear
            and config.hidden_act == "silu"
            and config.rope_parameters.get("rope_type", "default") in STATIC_ROPE
            and getattr(config, "sliding_window", None) is None
            and all(type(p) is nn.Parameter and p.is_floating_point() for p in model.parameters())
            and len({(p.dtype, p.device) for p in model.parameters()}) == 1
            and not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules())
            and all(type(m) is nn.Linear for name, m in backbone.named_modules() if name.endswith("_proj"))
        )

    def reserve(self, length: int) -> None:
        """Rotary tables for positions below `length`."""
        weight = self.backbone.embed_tokens.weight
        positions = torch.arange(length, device=weight.device)[None]
        cos, sin = self.backbone.rotary_emb(weight[:0], positions)  # (1, length, head_dim)
        half = sin.size(-1) // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor):
        """Hidden states `(T, hidden)` and rotary tables `(T, 1, head_dim)`."""
        return self.backbone.embed_tokens(ids), self.cos[positions][:, None], self.sin[positions][:, None]

    def prefill(self, prompts: list[torch.Tensor], block_length: int) -> list[Prefix]:
        """Keys and values of whole-block prompts, all of them in one pass over their concatenation."""
        sizes = [len(ids) for ids in prompts]
        prefixes = [Prefix([], [], size) for size in sizes]
        if not any(sizes):
            return prefixes
        every = [torch.arange(size, device=prompts[0].device) for size in sizes]
        blocks = [Grid(block_length).block(positions) for positions in every]
        masks = [block[:, None] >= block for block in blocks]
        x, cos, sin = self._embed(torch.cat(prompts), torch.cat(every))
        for i, layer in enumerate(self.layers):
            q, k, v = (torch.split_with_sizes(t.transpose(0, 1), sizes, dim=1) for t in layer.project(x, cos, sin))
            for prefix, k_i, v_i in zip(prefixes, k, v, strict=True):
                prefix.keys.append(k_i.contiguous())
                prefix.values.append(v_i.contiguous())
            if i == len(self.layers) - 1:
                break  # next to nobody reads what comes after the last keys and values
            pieces = zip(q, prefixes, masks, strict=True)
            attended = [layer.attend(q_i[None], p.keys[i][None], p.values[i][None], mask) for q_i, p, mask in pieces]
            x = layer.finish(x, torch.cat(attended))
        if self.shift:  # the last token of a prompt sees all of it
            whole = [(q_i[None, :, -1:], p) for q_i, p in zip(q, prefixes, strict=True) if p.length]
            attended = torch.cat([layer.attend(q_i, p.keys[i][None], p.values[i][None], None) for q_i, p in whole])
            ends = torch.tensor([size for size in sizes if size], device=x.device).cumsum(0) - 1
            logits = self.head(self.norm(layer.finish(x[ends], attended)))
            for (_, prefix), line in zip(whole, logits, strict=True):
                prefix.logits = line
        return prefixes

    def step(self, units, cache: SlotCache | None) -> torch.Tensor:
        """Logits `(n, V)` of the tokens in `units.read`. Without a cache, units are whole rows."""
        count, width = units.ids.shape
        x, cos, sin = self._embed(units.ids.view(-1), units.positions.view(-1))
        index = (units.slots[:, None], slice(None), units.positions)
        keys = torch.arange(units.length, device=x.device)
        mask = torch.where(keys < units.visible[:, None], 0.0, -torch.inf).to(x.dtype)[:, None, None]  # (U, 1, 1, K)
        spans = []  # per span: its units, what of the keys they see, the mask where they do not all see as much
        for first, last, longest, ragged, slot in units.spans:
            own = slice(first, last)
            row = own if cache is None else units.slots[own] if slot is None else slice(slot, slot + last - first)
            spans.append((own, (row, slice(None), slice(longest)), mask[own, ..., :longest] if ragged else None))
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, cos, sin)
            k, v = k.view(count, width, *k.shape[1:]), v.view(count, width, *v.shape[1:])
            if cache is None:
                stored_keys, stored_values = k.transpose(1, 2), v.transpose(1, 2)
            else:
                stored_keys, stored_values = cache.keys[i], cache.values[i]
                stored_keys[index], stored_values[index] = k, v
            final = i == len(self.layers) - 1  # after the last keys and values, only what may be read goes on
            here = [span for span in spans if not final or span[0].stop <= units.rows]
            if final and units.carried is not None:
                carried = units.carried.view(-1)
                q, x = q[carried], x[carried]
            q = q.view(count, -1, *q.shape[1:]).transpose(1, 2)  # (U, heads, W, d)
            attended = [layer.attend(q[own], stored_keys[seen], stored_values[seen], m) for own, seen, m in here]
            attended = torch.cat(attended) if len(attended) > 1 else attended[0]
            x = layer.finish(x[units.read], attended[units.read]) if final else layer.finish(x, attended)
        return self.head(self.norm(x))
