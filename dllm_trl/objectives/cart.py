"""Dream's context-adaptive weights: a masked token counts by how near it is to what the model sees."""

import math

import torch
import torch.nn.functional as F


def cart_weights(known: torch.Tensor, p: float = 0.3) -> torch.Tensor:
    r"""
    `w_i = sum over visible j of 0.5 p (1 - p)^(|i - j| - 1)`, 0 for visible tokens.

    Args:
        known (`torch.BoolTensor` of shape `(B, S)`):
            Tokens that exist and are not masked, in the order of their positions.
        p (`float`, *optional*, defaults to `0.3`):
            Of the geometric distribution. The larger, the nearer is what counts.

    Returns:
        `torch.FloatTensor` of shape `(B, S)`.
    """
    # What lies so far away that it is lost in float32 is left out
    reach = known.size(1) - 1
    if p < 1:
        reach = min(reach, math.ceil(math.log(1e-9) / math.log1p(-p)))
    reach = max(reach, 1)
    tail = 0.5 * p * (1 - p) ** torch.arange(reach, device=known.device, dtype=torch.float32)
    kernel = torch.cat([tail.flip(0), tail.new_zeros(1), tail])
    weight = F.conv1d(known.float()[:, None], kernel[None, None], padding=reach)[:, 0]
    return weight.masked_fill(known, 0)
