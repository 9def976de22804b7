"""What the fused decode forward is built of: a matrix product with what follows it, a norm, a decoder layer."""

import torch
import torch.nn.functional as F
from torch import nn


class Matrix:
    """
    `x @ weight.T + bias` over the rows of one or several linear layers, then SiLU, times `mul` or plus `add`. On CPU
    in float32 the weights are packed for oneDNN, which does all of it in one operation and is 2-3 times faster than
    plain products at the few rows of a decode step (measured on AVX-512).
    """

    def __init__(self, *linears: nn.Linear):
        weights = [linear.weight.detach() for linear in linears]
        self.bias = torch.cat([linear.bias.detach() for linear in linears]) if linears[0].bias is not None else None
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        plain = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self.packed = plain and torch.backends.mkldnn.is_available()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 16)  # 16: a typical number of rows

    def __call__(self, x, silu: bool = False, mul: torch.Tensor | None = None, add: torch.Tensor | None = None):
        if self.packed and mul is None and add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish" if silu else "none", [], "")
        if self.packed:
            other, op = (mul, "mul") if mul is not None else (add, "add")
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, op)
        out = F.linear(x, self.weight, self.bias)
        out = F.silu(out) if silu else out
        return out * mul if mul is not None else out + add if add is not None else out


class Norm:
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


class Layer:
    """A decoder layer of known arithmetic: normed and rotated projections, attention, and what comes after it."""

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
        rolled = qk.roll(self.head_dim // 2, dims=-1).to(sin.dtype)
        qk = torch.addcmul(qk * cos, rolled, sin).to(v.dtype)
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
