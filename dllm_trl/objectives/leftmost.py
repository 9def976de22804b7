import torch

from ..types import Round


def leftmost_rounds(
    exists: torch.Tensor, trained: torch.Tensor, *, blocks: torch.Tensor | None = None, width: int = 1
) -> list[Round]:
    r"""
    Decoding from left to right. Round `r` shows the first `r * width` response tokens of every block and scores the
    next `width`.

    Args:
        exists (`torch.BoolTensor` of shape `(B, R)`):
            Positions that the response has. They are masked as long as they are not shown.
        trained (`torch.BoolTensor` of shape `(B, R)`):
            Tokens that count. The others are never scored.
        blocks (`torch.LongTensor` of shape `(B, R)`, *optional*):
            Block attention: block of each token. `None`: full attention, where the response is one.
        width (`int`, *optional*, defaults to `1`):
            Tokens per round and block.

    Returns:
        `list[Round]`: At least one round. Together they score every token of `trained` once.
    """
    columns = torch.arange(exists.size(1), device=exists.device).expand(exists.shape)
    if blocks is not None:  # the first of them starts with the response, wherever it lies on the grid
        starts = torch.nn.functional.pad(blocks.diff() != 0, (1, 0))
        columns = columns - torch.where(starts, columns, 0).cummax(1).values
    turn = torch.where(exists, columns // width, -1)
    num_rounds = int(turn.masked_fill(~trained, 0).max()) + 1
    return [Round(masked=turn >= r, scored=(turn == r) & trained) for r in range(num_rounds)]
