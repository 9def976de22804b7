"""The two building blocks of the fused decode forward: a matrix product with what follows it, and a norm."""

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
