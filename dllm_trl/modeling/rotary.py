"""Rotary positions in float32, rounded once: in half precision the angle of a far position is off by whole steps."""

import torch

from dllm_trl._compat import rebound


class Float32RotaryMixin:
    """Cosines and sines in float32, whatever the model computes in. Mixed in before a stock rotary embedding."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x[..., :0].float(), position_ids)


def rotating_in_float32(attention: type[torch.nn.Module]):
    """The forward of a stock attention class, which rounds rotated queries and keys to the type they came in."""
    stock = attention.forward.__globals__["apply_rotary_pos_emb"]

    def rotate(q, k, cos, sin):
        return tuple(x.to(q.dtype) for x in stock(q, k, cos, sin))

    return rebound(attention.forward, apply_rotary_pos_emb=rotate)
