"""
A decode forward of our own over the model's parameters, for plain llama-like decoders (Qwen3, Qwen3-MoE, Qwen2,
Llama): one projection for queries, keys and values, residual and gate folded into the matrix products, keys and values
written in place, and after the last layer's keys and values only the tokens that need logits are carried on.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .cache import Prefix, SlotCache


# Layers whose arithmetic is known here, each with its attention
LAYERS = {f"{family}DecoderLayer": f"{family}Attention" for family in ("Qwen3", "Qwen3Moe", "Qwen2", "Llama")}
STATIC_ROPE = {"default", "linear", "yarn", "llama3"}


def _can_pack(weight: torch.Tensor) -> bool:
    # oneDNN's packed matrices are 2-3 times faster than plain ones at the few rows of a decode step (measured on
    # AVX-512)
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Matrix:
    """`x @ weight.T + bias`, optionally with SiLU, times `mul` or plus `add`, in one operation where oneDNN offers
    it."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None], rows: int):
        self.bias = torch.cat(biases) if biases[0] is not None else None
        self.packed = _can_pack(weights[0])
        if self.packed or len(weights) > 1:
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        else:
            self.weight = weights[0]

    def __call__(self, x, silu=False, mul=None, add=None):
        if self.packed:
            other = mul if mul is not None else add
            if other is not None:
                op = "mul" if mul is not None else "add"
                return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, op)
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish" if silu else "none", [], "")
        out = F.linear(x, self.weight, self.bias)
        out = F.silu(out) if silu else out
        return out * mul if mul is not None else out + add if add is not None else out


def _matrix(*linears: nn.Linear, rows: int = 16) -> _Matrix:
    return _Matrix([m.weight.detach() for m in linears], [m.bias for m in linears], rows)


class _Norm:
    """Root mean square norm over the last dimension, with the weight of `norm` or another."""

    def __init__(self, norm: nn.Module, weight: torch.Tensor | None = None):
        self.weight = (norm.weight if weight is None else weight).detach()
        self.eps, size = norm.variance_epsilon, self.weight.size(-1)
        # x / sqrt(mean(x^2) + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps)): four operations in place of six
        self.scaled, self.root = self.weight * size**0.5, self.weight.new_tensor((size * self.eps) ** 0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.root) * self.scaled


class _Layer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.output_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.qkv = _matrix(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _matrix(attention.o_proj)
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads
            self.head_norm = _Norm(attention.q_norm, torch.stack(weights))  # (heads + kv_heads, head_dim)
        self.mlp = mlp
        self.dense = hasattr(mlp, "gate_proj")
        if self.dense:
            self.gate, self.up, self.down = _matrix(mlp.gate_proj), _matrix(mlp.up_proj), _matrix(mlp.down_proj)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Normed and rotated queries `(T, heads, d)` and keys, and values `(T, kv_heads, d)`."""
        qkv = self.qkv(self.input_norm(x)).view(x.size(0), -1, self.head_dim)
        qk, v = torch.split_with_sizes(qkv, [self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        # rotate_half(x) * sin = roll(x, d / 2) * signed sin
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)
        return *torch.split_with_sizes(qk, [self.heads, self.kv_heads], dim=1), v

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = self.out(attended, add=x)
        hidden = self.output_norm(x)
        if self.dense:
            return self.down(self.up(hidden, mul=self.gate(hidden, silu=True)), add=x)
        return x + self.mlp(hidden[None])[0]


class FusedForward:
    """See the module's docstring. Holds packed copies of the weights on CPU; build it anew after the weights
    changed."""

    def __init__(self, model: nn.Module):
        self.backbone, self.config = model.base_model, model.config
        self.layers = [_Layer(layer) for layer in self.backbone.layers]
        self.norm, self.head = _Norm(self.backbone.norm), _matrix(model.get_output_embeddings())
        self.tables = (None, None)

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether `model` is as its class made it: known layers, plain float parameters, no hooks, no adapters."""
        backbone, head = model.base_model, model.get_output_embeddings()
        layers = getattr(backbone, "layers", [])
        config = model.config
        return (
            len(layers) > 0
            and all(type(layer).__name__ in LAYERS for layer in layers)
            and all(type(layer.self_attn).__name__ == LAYERS[type(layer).__name__] for layer in layers)
            and type(head) is nn.Linear
            and config.hidden_act == "silu"
            and config.rope_parameters.get("rope_type", "default") in STATIC_ROPE
            and getattr(config, "sliding_window", None) is None
            and all(type(p) is nn.Parameter and p.is_floating_point() for p in model.parameters())
            and len({(p.dtype, p.device) for p in model.parameters()}) == 1
            and not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules())
            and all(type(m) is nn.Linear for n, m in backbone.named_modules() if n.endswith("_proj"))
        )

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.tables
        end = int(positions.max()) + 1
        if cos is None or cos.size(0) < end:
            every = torch.arange(max(end, 256, 2 * (0 if cos is None else cos.size(0))), device=positions.device)
            x = torch.empty(0, dtype=dtype, device=positions.device)
            cos, sin = (table[0] for table in self.backbone.rotary_emb(x, every[None]))  # (L, head_dim)
            half = sin.size(-1) // 2
            self.tables = cos, sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        return cos[positions][:, None], sin[positions][:, None]  # (T, 1, head_dim)

    def prefill(self, prompts: list[torch.Tensor], block_length: int) -> list[Prefix]:
        """Keys and values of whole-block prompts, all of them in one pass over their concatenation."""
        sizes = [len(ids) for ids in prompts]
        prefixes = [Prefix([], [], size) for size in sizes]
        if not any(sizes):
            return prefixes
        positions = torch.cat([torch.arange(size, device=prompts[0].device) for size in sizes])
        x = self.backbone.embed_tokens(torch.cat(prompts))  # (T, hidden)
        cos, sin = self._rotary(positions, x.dtype)
        blocks = [torch.arange(size, device=x.device) // block_length for size in sizes]
        masks = [b[:, None] >= b for b in blocks]
        for layer in self.layers:
            q, k, v = (t.transpose(0, 1) for t in layer.project(x, cos, sin))  # (heads, T, d)
            attended = []
            pieces = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), masks, prefixes, strict=True)
            for q_i, k_i, v_i, mask, prefix in pieces:
                prefix.keys.append(k_i.contiguous())
                prefix.values.append(v_i.contiguous())
                if layer is not self.layers[-1]:
                    attended.append(_attend(q_i[None], k_i[None], v_i[None], mask, layer))
            if layer is self.layers[-1]:
                return prefixes  # nobody reads what comes after the last keys and values
            x = layer.finish(x, torch.cat(attended))

    def step(self, units, cache: SlotCache) -> torch.Tensor:
        """Logits `(n, V)` of the tokens in `units.read`."""
        count, width = units.ids.shape
        rows, _dense = units.rows, units.rows * width
        x = self.backbone.embed_tokens(units.ids.view(-1))  # (T, hidden)
        cos, sin = self._rotary(units.positions.view(-1), x.dtype)
        index = (units.slots[:, None], slice(None), units.positions)
        keys = torch.arange(units.length, device=x.device)
        mask = torch.where(keys < units.visible[:, None], 0.0, -torch.inf).to(x.dtype)[:, None, None]  # (U, 1, 1, K)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, cos, sin)
            stored_keys, stored_values = cache.keys[i], cache.values[i]
            stored_keys[index] = k.view(count, width, *k.shape[1:])
            stored_values[index] = v.view(count, width, *v.shape[1:])
            q = q.view(count, width, *q.shape[1:]).transpose(1, 2)  # (U, heads, W, d)
            seen = stored_keys[:rows, :, : units.length], stored_values[:rows, :, : units.length]
            attended = _attend(q[:rows], *seen, mask[:rows], layer)
            if i == len(self.layers) - 1:
                x = layer.finish(x[units.read], attended[units.read])
                break
            if count > rows:
                slots = units.slots[rows:]
                seen = stored_keys[slots, :, : units.length], stored_values[slots, :, : units.length]
                attended = torch.cat([attended, _attend(q[rows:], *seen, mask[rows:], layer)])
            x = layer.finish(x, attended)
        return self.head(self.norm(x))


def _attend(q, k, v, mask, layer: _Layer) -> torch.Tensor:
    """Grouped-query attention `(B, heads, Q, d) x (B, kv_heads, K, d) -> (B * Q, heads * d)`: the heads of a group are
    queries of one head, which needs no repeated keys."""
    batch, heads, queries, dim = q.shape
    group = heads // layer.kv_heads
    q = q.reshape(batch, layer.kv_heads, group * queries, dim)
    if mask.dim() == 2:  # (Q, K), another line for each query
        mask = mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scaling)
    out = out.view(batch, heads, queries, dim)
    return out.transpose(1, 2).reshape(batch * queries, heads * dim)
