"""What flows between the decoding engine, the objectives and the trainers. Torch only: no model, no trainer."""

from dataclasses import dataclass, fields

import torch


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


@dataclass
class DiffusionRollout:
    r"""
    A batch of decoded responses: everything a trainer needs to score exactly what the rollout saw.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, left-padded.
        prompt_mask (`torch.LongTensor` of shape `(B, P)`):
            1 for prompt tokens, 0 for padding.
        completion_ids (`torch.LongTensor` of shape `(B, R)`):
            Responses, cut after the first EOS (which is kept), padded on the right with the pad token.
        completion_mask (`torch.LongTensor` of shape `(B, R)`):
            1 for the tokens of `completion_ids`.
        canvas_ids (`torch.LongTensor` of shape `(B, R)`):
            What the row's context was: all committed tokens, also those after EOS in EOS's block, and with full
            attention the mask tokens that were never decoded.
        canvas_mask (`torch.LongTensor` of shape `(B, R)`):
            1 where the position existed for the row.
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Denoising step (from 0) at which each token was committed, -1 where nothing was.
        logprobs (`torch.FloatTensor` of shape `(B, R)`):
            Log-probability (natural log) of each token when it was committed, 0 where nothing was.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Denoising forwards whose result the row used.
        block_length (`int`):
            Tokens denoised together.
        anchor (`str`, *optional*, defaults to `"prompt"`):
            Where blocks are counted from: token `i` of the pad-free sequence (`"prompt"`, block attention) or of the
            response (`"response"`, full attention) belongs to block `i // block_length`.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    canvas_ids: torch.Tensor
    canvas_mask: torch.Tensor
    step_map: torch.Tensor
    logprobs: torch.Tensor
    num_forward_passes: torch.Tensor
    block_length: int
    anchor: str = "prompt"

    def __post_init__(self):
        if self.block_length < 1:
            raise ValueError(f"`block_length` must be at least 1, but is {self.block_length}.")
        if self.anchor not in ("prompt", "response"):
            raise ValueError(f'`anchor` must be "prompt" or "response", but is {self.anchor!r}.')
        batch, response = self.canvas_ids.shape
        _check("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape))
        _check("num_forward_passes", self.num_forward_passes, (batch,))
        for name in ("completion_ids", "completion_mask", "canvas_mask", "step_map", "logprobs"):
            _check(name, getattr(self, name), (batch, response))
        if ((self.step_map >= 0) & (self.canvas_mask == 0)).any():
            raise ValueError("`step_map` names a step at a position that does not exist in `canvas_mask`.")
        if ((self.completion_mask == 1) & (self.step_map < 0)).any():
            raise ValueError("`completion_mask` holds tokens that `step_map` says were never committed.")

    def __len__(self) -> int:
        return self.canvas_ids.size(0)

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per denoising forward, over the whole batch."""
        return (self.step_map >= 0).sum().item() / max(self.num_forward_passes.sum().item(), 1)

    def to(self, device: torch.device | str) -> "DiffusionRollout":
        """Moves every tensor to `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return DiffusionRollout(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()})


@dataclass
class Round:
    r"""
    One corruption of a batch of responses and the tokens that are scored under it.

    Args:
        masked (`torch.BoolTensor` of shape `(B, R)`):
            Response positions the model sees as mask tokens.
        scored (`torch.BoolTensor` of shape `(B, R)`):
            Positions whose log-probability is read, a subset of `masked`.
        weight (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            Weight of each scored token in the loss; `None` means 1.
    """

    masked: torch.Tensor
    scored: torch.Tensor
    weight: torch.Tensor | None = None

    def __post_init__(self):
        _check("scored", self.scored, tuple(self.masked.shape))
        if self.weight is not None:
            _check("weight", self.weight, tuple(self.masked.shape))
        if (self.scored & ~self.masked).any():
            raise ValueError("`scored` must be a subset of `masked`: only a masked token has a likelihood.")
