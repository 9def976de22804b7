"""Rounds of rows through a model: log-probabilities, entropies or values of the scored tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..types import Round, Rows
from .layout import PackedRounds, pack_causal, pack_rounds


@dataclass
class Scores:
    r"""
    What a model says about the `n` scored tokens of `K` rounds.

    Args:
        index (`tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]`, each of shape `(n,)`):
            Round, row and response column of each.
        shape (`tuple[int, int, int]`):
            `(K, B, R)`.
        logps (`torch.FloatTensor` of shape `(n,)`, *optional*):
            Log-probabilities (natural log), with gradient.
        entropies (`torch.FloatTensor` of shape `(n,)`, *optional*):
            Entropies in nats, where the head computes them.
        is_top1 (`torch.BoolTensor` of shape `(n,)`, *optional*):
            Whether the token is the most likely one, where the head says so.
        values (`torch.FloatTensor` of shape `(n,)`, *optional*):
            Values of a critic, with gradient.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of experts.
    """

    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    shape: tuple[int, int, int]
    logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    values: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None

    def dense(self, name: str) -> torch.Tensor:
        """`logps`, `entropies`, `is_top1` or `values` as `(K, B, R)`, 0 where nothing is scored. Differentiable."""
        values = getattr(self, name)
        return values.new_zeros(self.shape).index_put(self.index, values)

    def mean(self, name: str) -> torch.Tensor:
        """The same as `(B, R)`: the mean over the rounds that score a token."""
        times = torch.zeros(self.shape[1:], device=self.index[1].device)
        times = times.index_put(self.index[1:], torch.ones((), device=times.device), accumulate=True)
        return self.dense(name).sum(0) / times.clamp(min=1)


def _check_rounds(rounds: list[Round], rows: Rows) -> None:
    """Raises if that is not what an objective returns."""
    shape = tuple(rows.canvas_ids.shape)
    if not isinstance(rounds, list) or not rounds or not all(isinstance(one, Round) for one in rounds):
        raise ValueError(f"`objective` must return a list of at least one `Round`, but returned {rounds!r}.")
    for number, one in enumerate(rounds):
        if tuple(one.masked.shape) != shape:
            raise ValueError(
                f"`objective` must return rounds of the shape {shape} of the canvas, but `masked` of round {number} "
                f"has {tuple(one.masked.shape)}."
            )
        if one.prompt_masked is None and rounds[0].prompt_masked is None:
            continue
        if one.prompt_masked is not None and one.prompt_masked.shape != rows.prompt_ids.shape:
            raise ValueError(
                "`objective` must return rounds whose `prompt_masked` has the shape "
                f"{tuple(rows.prompt_ids.shape)} of the prompts, but that of round {number} has "
                f"{tuple(one.prompt_masked.shape)}."
            )
        if None in (one.prompt_masked, rounds[0].prompt_masked) or not torch.equal(
            one.prompt_masked, rounds[0].prompt_masked
        ):
            raise ValueError("`objective` must return rounds of one view that mask the same prompt tokens.")


def _hide_prompts(rows: Rows, hidden: torch.Tensor | None, mask_token_id: int) -> Rows:
    """The rows as a model sees them whose prompt tokens of `hidden` are mask tokens."""
    if hidden is None:
        return rows
    return replace(rows, prompt_ids=rows.prompt_ids.masked_fill(hidden, mask_token_id))


def _in_step(packed: PackedRounds, most: Callable[[int], int] | None) -> PackedRounds:
    chunks = getattr(packed.plan, "plans", None)
    return packed if most is None or chunks is None else packed.pad_chunks(most(len(chunks)))


@dataclass
class Scorer:
    r"""
    Computes what a model says about the tokens that rounds score: one packed forward through `model(...)`, as whatever
    wraps the model wants it. Needs no trainer.

    Args:
        mask_token_id (`int`):
            Token that stands for a masked position.
        logit_shift (`int`, *optional*, defaults to `0`):
            1 where the model predicts a token at the position before it.
        rounds_per_forward (`int`, *optional*):
            Full attention: rounds of each row that go through the model at a time. `None`: all.
        head (`str`, *optional*, defaults to `"lm"`):
            `"lm"`: log-probabilities. `"fused"`: the same of a model to which TRL's trainers gave a fused head
            (`add_fused_lm_head`), which never holds the logits of the whole vocabulary. `"value"`: the model is a
            critic, whose forward gives one logit per position.
        temperature (`float`, *optional*, defaults to `1.0`):
            What the logits are divided by; a fused head has its own.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Block attention: whether rows with the same prompt share its full blocks.
        most (`Callable[[int], int]`, *optional*):
            Sharded models: the largest of a number over all processes, which then run as many forwards each.
    """

    mask_token_id: int
    logit_shift: int = 0
    rounds_per_forward: int | None = None
    head: str = "lm"
    temperature: float = 1.0
    share_prompts: bool = True
    most: Callable[[int], int] | None = None

    def __post_init__(self):
        if self.head not in _HEADS:
            raise ValueError(f"`head` must be one of {sorted(_HEADS)}, but is {self.head!r}.")

    def pack(self, rows: Rows, rounds: list[Round], causal: bool = False) -> PackedRounds:
        """The layout of the forward: with `causal`, that of a left-to-right model."""
        if causal:
            return pack_causal(rows, rounds[0])
        packed = pack_rounds(
            rows,
            rounds,
            mask_token_id=self.mask_token_id,
            logit_shift=self.logit_shift,
            share_prompts=self.share_prompts,
            rounds_per_forward=self.rounds_per_forward,
        )
        return _in_step(packed, self.most)

    def __call__(
        self,
        model: nn.Module,
        rows: Rows,
        rounds: list[Round],
        causal: bool = False,
        aux_loss: bool = False,
        noise: Callable[[PackedRounds, Rows], torch.Tensor] | None = None,
    ) -> Scores:
        r"""
        Args:
            model (`nn.Module`):
                A diffusion language model, wrapped or not.
            rows ([`Rows`]):
                Prompts and canvases.
            rounds (`list[Round]`):
                What is masked and scored.
            causal (`bool`, *optional*, defaults to `False`):
                Whether tokens are read from left to right instead.
            aux_loss (`bool`, *optional*, defaults to `False`):
                Whether experts compute their load-balancing loss.
            noise (`Callable[[PackedRounds, Rows], torch.Tensor]`, *optional*):
                Gives what is added to the embeddings of the packed tokens, `(1, N, H)`.

        Returns:
            [`Scores`]
        """
        _check_rounds(rounds, rows)
        packed = self.pack(_hide_prompts(rows, rounds[0].prompt_masked, self.mask_token_id), rounds, causal)
        options = {"output_router_logits": True} if aux_loss else {}
        if noise is not None:
            options["embedding_noise"] = noise(packed, rows)
        return _HEADS[self.head](model, packed, options, self.temperature)


def _fused(model: nn.Module, packed: PackedRounds, options: dict, temperature: float) -> Scores:
    outputs = model(**packed.model_inputs(), **options, shift_labels=packed.labels[None], fused_lm_head=True)
    extra = (None if x is None else x[0] for x in (outputs.entropy, outputs.is_top1))
    return Scores(packed.index, packed.shape, outputs.log_probs[0], *extra, aux_loss=outputs.aux_loss)


def _lm(model: nn.Module, packed: PackedRounds, options: dict, temperature: float) -> Scores:
    outputs = model(**packed.model_inputs(), **options)
    every = (outputs.logits[0].float() / temperature).log_softmax(-1)  # (n, V)
    logps = every.gather(-1, packed.labels[:, None]).squeeze(-1)
    entropies = -(every.exp() * every).nan_to_num(0.0).sum(-1)
    is_top1 = every.argmax(-1) == packed.labels
    return Scores(packed.index, packed.shape, logps, entropies, is_top1, aux_loss=outputs.get("aux_loss"))


def _value(model: nn.Module, packed: PackedRounds, options: dict, temperature: float) -> Scores:
    values = model(**packed.model_inputs(), **options).logits
    if values.size(-1) != 1:
        raise ValueError(
            f"A critic must give one number per position, but `{type(model).__name__}` gives {values.size(-1)}. Load "
            "it with `num_labels=1`."
        )
    return Scores(packed.index, packed.shape, values=values.float().flatten())


_HEADS = {"lm": _lm, "fused": _fused, "value": _value}
