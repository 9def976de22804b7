"""
A decode forward of our own over the model's parameters, for plain llama-like decoders (Qwen3, Qwen3-MoE, Qwen2,
Llama): one projection for queries, keys and values, residual and gate folded into the matrix products, keys and values
written in place, and after the last layer's keys and values only the tokens that need logits are carried on.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .cache import Prefix, SlotCache
from .fused_ops import Matrix, Norm


# Layers whose arithmetic is known here, each with its attention
LAYERS = {f"{family}DecoderLayer": f"{family}Attention" for family in ("Qwen3", "Qwen3Moe", "Qwen2", "Llama")}
STATIC_ROPE = {"default", "linear", "yarn", "llama3"}


class _Layer:
    def __init__(self, layer: nn.Module):
        attention, self.mlp = layer.self_attn, layer.mlp
        self.input_norm, self.output_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.qkv = Matrix(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Matrix(attention.o_proj)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads
            self.head_norm = Norm(attention.q_norm, torch.stack(weights))  # (heads + kv_heads, head_dim)
        self.dense = hasattr(self.mlp, "gate_proj")
        if self.dense:
            self.gate, self.up, self.down = (
                Matrix(getattr(self.mlp, f"{name}_proj")) for name in ("gate", "up", "down")
            )

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Normed and rotated queries `(T, heads, d)` and keys, and values `(T, kv_heads, d)`."""
        qkv = self.qkv(self.input_norm(x)).view(x.size(0), -1, self.head_dim)
        qk, v = torch.split_with_sizes(qkv, [self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        # rotate_half(x) * sin = roll(x, d / 2) * signed sin
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)
        return *torch.split_with_sizes(qk, [self.heads, self.kv_heads], dim=1), v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`(B, heads, Q, d)` over `(B, kv_heads, K, d)` to `(B * Q, heads * d)`: the heads of a group are queries of
        one head, which needs no repeated keys."""
        batch, heads, queries, dim = q.shape
        q = q.reshape(batch, self.kv_heads, -1, dim)
        if mask is not None and mask.dim() == 2:  # (Q, K), another line for each query
            mask = mask.repeat(heads // self.kv_heads, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return out.view(batch, heads, queries, dim).transpose(1, 2).reshape(batch * queries, heads * dim)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = self.out(attended, add=x)
        hidden = self.output_norm(x)
        if self.dense:
            return self.down(self.up(hidden, mul=self.gate(hidden, silu=True)), add=x)
        return x + self.mlp(hidden[None])[0]


class FusedForward:
    """See the module's docstring. Holds packed copies of the weights on CPU: build a new one after they changed."""

    def __init__(self, model: nn.Module):
        self.backbone = model.base_model
        self.layers = [_Layer(layer) for layer in self.backbone.layers]
        self.norm, self.head = Norm(self.backbone.norm), Matrix(model.get_output_embeddings())
        self.cos = self.sin = None

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether `model` is as its class made it: known layers, plain float parameters, no hooks, no adapters."""
        backbone, config, layers = model.base_model, model.config, getattr(model.base_model, "layers", [])
        return (
            len(layers) > 0
            and all(type(layer.self_attn).__name__ == LAYERS.get(type(layer).__name__) for layer in layers)
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
        masks = [(x // block_length)[:, None] >= x // block_length for x in every]
        x, cos, sin = self._embed(torch.cat(prompts), torch.cat(every))
        for i, layer in enumerate(self.layers):
            q, k, v = (torch.split_with_sizes(t.transpose(0, 1), sizes, dim=1) for t in layer.project(x, cos, sin))
            for prefix, k_i, v_i in zip(prefixes, k, v, strict=True):
                prefix.keys.append(k_i.contiguous())
                prefix.values.append(v_i.contiguous())
            if i == len(self.layers) - 1:
                break  # nobody reads what comes after the last keys and values
            pieces = zip(q, prefixes, masks, strict=True)
            attended = [layer.attend(q_i[None], p.keys[i][None], p.values[i][None], mask) for q_i, p, mask in pieces]
            x = layer.finish(x, torch.cat(attended))
        return prefixes

    def step(self, units, cache: SlotCache) -> torch.Tensor:
        """Logits `(n, V)` of the tokens in `units.read`."""
        count, width = units.ids.shape
        x, cos, sin = self._embed(units.ids.view(-1), units.positions.view(-1))
        index = (units.slots[:, None], slice(None), units.positions)
        keys = torch.arange(units.length, device=x.device)
        mask = torch.where(keys < units.visible[:, None], 0.0, -torch.inf).to(x.dtype)[:, None, None]  # (U, 1, 1, K)
        spans = []  # per span: its units, what of the cache they see, the mask where they do not all see as much
        for first, last, longest, ragged in units.spans:
            own = slice(first, last)
            row = own if last <= units.rows else units.slots[own]
            spans.append((own, (row, slice(None), slice(longest)), mask[own, ..., :longest] if ragged else None))
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, cos, sin)
            stored_keys, stored_values = cache.keys[i], cache.values[i]
            stored_keys[index] = k.view(count, width, *k.shape[1:])
            stored_values[index] = v.view(count, width, *v.shape[1:])
            q = q.view(count, width, *q.shape[1:]).transpose(1, 2)  # (U, heads, W, d)
            final = i == len(self.layers) - 1  # after the last keys and values, committed blocks are done
            here = [span for span in spans if not final or span[0].stop <= units.rows]
            attended = [layer.attend(q[own], stored_keys[seen], stored_values[seen], m) for own, seen, m in here]
            attended = torch.cat(attended) if len(attended) > 1 else attended[0]
            x = layer.finish(x[units.read], attended[units.read]) if final else layer.finish(x, attended)
        return self.head(self.norm(x))
