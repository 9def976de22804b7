"""What flows from the decoding engine through objectives and scoring to the loss. Torch only: no model, no trainer."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


@dataclass(frozen=True)
class Grid:
    r"""
    Where the blocks of a sequence lie. The only place that divides by the block length.

    Args:
        block_length (`int` or `None`):
            Tokens denoised together. `None`: the whole response is one block, which only full attention can have.
        anchor (`str`, *optional*, defaults to `"prompt"`):
            Where blocks are counted from: token `i` of the sequence without its padding (`"prompt"`, block attention)
            or of the response (`"response"`, full attention) belongs to block `i // block_length`.
    """

    block_length: int | None
    anchor: str = "prompt"

    def __post_init__(self):
        if self.anchor not in ("prompt", "response"):
            raise ValueError(f'`anchor` must be "prompt" or "response", but is {self.anchor!r}.')
        if self.block_length is None and self.anchor == "prompt":
            raise ValueError("`block_length` must be a number with block attention, but is `None`.")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"`block_length` must be at least 1, but is {self.block_length}.")

    @classmethod
    def of(cls, attention: str, block_length: int | None) -> "Grid":
        """The grid of a family with `"block"` or `"full"` attention."""
        return cls(block_length, "prompt" if attention == "block" else "response")

    @property
    def attention(self) -> str:
        """`"block"` where blocks see themselves and earlier ones, `"full"` where everybody sees everybody."""
        return "block" if self.anchor == "prompt" else "full"

    # Positions and lengths are counted from the anchor. All of it works on integers, arrays and tensors alike.

    def block(self, position: Any) -> Any:
        """Block that a position lies in."""
        return position * 0 if self.block_length is None else position // self.block_length

    def offset(self, position: Any) -> Any:
        """Place of a position in its block."""
        return position if self.block_length is None else position % self.block_length

    def floor(self, length: Any) -> Any:
        """Length of the whole blocks within `length`."""
        return length - self.offset(length)

    def ceil(self, length: Any) -> Any:
        """Length of the blocks that hold `length` tokens."""
        return length if self.block_length is None else length + -length % self.block_length

    def count(self, length: Any) -> Any:
        """Blocks that hold `length` tokens."""
        return self.block(self.ceil(length)) if self.block_length is not None else length * 0 + 1

    def canvas_blocks(self, prompt_mask: torch.Tensor, width: int) -> torch.Tensor:
        """Block `(B, width)` of each response position behind the prompts of `prompt_mask` `(B, P)`."""
        columns = torch.arange(width, device=prompt_mask.device).expand(len(prompt_mask), -1)
        return self.block(columns + prompt_mask.sum(1, keepdim=True) if self.anchor == "prompt" else columns)


@dataclass
class Rows:
    r"""
    Prompts and responses as a trainer scores them: what a micro-batch carries through TRL's shuffle, split, buffer and
    resume.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded anywhere.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 for prompt tokens, 0 for padding.
        canvas_ids (`torch.LongTensor` of shape `(B, R)`):
            The clean response, with every token that was context of another.
        canvas_mask (`torch.Tensor` of shape `(B, R)`):
            1 where the position exists for the row.
        grid ([`Grid`]):
            Where the blocks lie.
        trained (`torch.BoolTensor` of shape `(B, R)`, *optional*):
            Response tokens that count in the loss. `None`: all that exist.
        step_map (`torch.LongTensor` of shape `(B, R)`, *optional*):
            Denoising step (from 0) at which each token was committed, -1 where nothing was.
        draws (`dict[str, torch.Tensor]`, each of shape `(B, ...)`, *optional*):
            What the objective drew at random for each row: old, reference and current policy see the same.
        entropies (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            Entropy of the distribution each token was committed from, where the rollout recorded it.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    canvas_ids: torch.Tensor
    canvas_mask: torch.Tensor
    grid: Grid
    trained: torch.Tensor | None = None
    step_map: torch.Tensor | None = None
    draws: dict[str, torch.Tensor] = field(default_factory=dict)
    entropies: torch.Tensor | None = None

    def __post_init__(self):
        if self.trained is None:
            self.trained = self.canvas_mask.bool()
        rows = len(self.prompt_ids)
        _check("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape))
        _check("canvas_ids", self.canvas_ids, (rows, self.canvas_ids.shape[-1]))
        for name in ("canvas_mask", "trained", "step_map", "entropies"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), tuple(self.canvas_ids.shape))
        for name, tensor in self.draws.items():
            _check(f"draws[{name!r}]", tensor, (rows, *tensor.shape[1:]))

    def __len__(self) -> int:
        return len(self.canvas_ids)

    def __getitem__(self, rows: slice) -> "Rows":
        """Some of the rows, as a view."""
        return replace(
            self,
            **{name: tensor[rows] for name, tensor in self._tensors().items()},
            draws={name: tensor[rows] for name, tensor in self.draws.items()},
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if torch.is_tensor(value)}

    @property
    def blocks(self) -> torch.Tensor:
        """Block `(B, R)` of each response position."""
        return self.grid.canvas_blocks(self.prompt_mask, self.canvas_ids.size(1))

    def to_batch(self) -> dict[str, torch.Tensor]:
        """The tensors under keys that a batch of TRL's can hold beside its own."""
        draws = {f"rows/draws/{name}": tensor for name, tensor in self.draws.items()}
        return {f"rows/{name}": tensor for name, tensor in self._tensors().items()} | draws

    @classmethod
    def from_batch(cls, batch: dict[str, Any], grid: Grid) -> "Rows":
        """
        Back from [`Rows.to_batch`].

        Raises:
            ValueError: the batch has no rows, so that nobody knows what its responses saw.
        """
        held = {key.removeprefix("rows/"): value for key, value in batch.items() if key.startswith("rows/")}
        if not held:
            raise ValueError(
                f"The batch has no rows, only {sorted(batch)}: without the canvas and the steps of a rollout there is "
                "no context to score its tokens in. Batches come from the trainer's own rollouts (`Rows.to_batch`)."
            )
        draws = {key.removeprefix("draws/"): held.pop(key) for key in list(held) if key.startswith("draws/")}
        return cls(**held, grid=grid, draws=draws)


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
        grid ([`Grid`]):
            Where its blocks lie.
        policy_step (`int`, *optional*):
            Optimizer step of the weights that decoded it, where somebody keeps count.
        entropies (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            Entropy (nats) of the distribution each token was committed from, softmax(logits / temperature) over the
            whole vocabulary before any filter, 0 where nothing was. `None`: nobody asked for it.
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
    grid: Grid
    policy_step: int | None = None
    entropies: torch.Tensor | None = None

    def __post_init__(self):
        batch, response = self.canvas_ids.shape
        _check("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape))
        _check("num_forward_passes", self.num_forward_passes, (batch,))
        for name in ("completion_ids", "completion_mask", "canvas_mask", "step_map", "logprobs"):
            _check(name, getattr(self, name), (batch, response))
        if self.entropies is not None:
            _check("entropies", self.entropies, (batch, response))
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

    def rows(self, num_trained_pads: int | None = 0) -> Rows:
        """
        What a trainer scores of it: the completions and, of the tokens decoded after EOS, the first `num_trained_pads`
        (`None`: all), in the context of the whole canvas.
        """
        completed = self.completion_mask.bool()
        after = (self.step_map >= 0) & ~completed
        pads = self.step_map.size(1) if num_trained_pads is None else num_trained_pads
        trained = completed | (after & (after.cumsum(1) <= pads))
        canvas = (self.prompt_ids, self.prompt_mask, self.canvas_ids, self.canvas_mask)
        return Rows(*canvas, self.grid, trained, self.step_map, entropies=self.entropies)

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
        loss_weight (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            Weight of each scored token in the loss; `None` means 1.
        prompt_masked (`torch.BoolTensor` of shape `(B, P)`, *optional*):
            Prompt tokens that the model sees as mask tokens, the same in all rounds of a view; `None` means none.
    """

    masked: torch.Tensor
    scored: torch.Tensor
    loss_weight: torch.Tensor | None = None
    prompt_masked: torch.Tensor | None = None

    def __post_init__(self):
        _check("scored", self.scored, tuple(self.masked.shape))
        if self.loss_weight is not None:
            _check("loss_weight", self.loss_weight, tuple(self.masked.shape))
        if (self.scored & ~self.masked).any():
            raise ValueError("`scored` must be a subset of `masked`: only a masked token has a likelihood.")
