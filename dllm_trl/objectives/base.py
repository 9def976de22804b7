"""What an objective is, for fine-tuning and for reinforcement learning alike. Tensors only."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ..types import Round, Rows


class Random(Protocol):
    """
    Uniform numbers in [0, 1) for an objective to draw from: a function of the run's seed and of each row's place in
    the run (or of what the row holds), never of a generator's state.
    """

    def uniform(self, where: torch.Tensor) -> torch.Tensor:
        """A number for each `True` of `where` `(B, n)`, 0 elsewhere."""

    def levels(self, where: torch.Tensor) -> torch.Tensor:
        """The same for noise levels, which may be spread evenly over [0, 1) within a batch."""


@dataclass
class LossInputs:
    r"""
    All that a loss of reinforcement learning is made of.

    Args:
        rows ([`Rows`]):
            Prompts and responses.
        rounds (`list[Round]`):
            The `K` rounds that were scored.
        token_logps (`torch.FloatTensor` of shape `(K, B, R)`):
            Log-probabilities of the scored tokens in each round, 0 elsewhere, with gradient.
        logps (`torch.FloatTensor` of shape `(B, R)`):
            What [`Objective.reduce`] made of them.
        old_logps (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            The same under the policy that decoded the rollout. `None`: the weights have not changed since.
        ref_logps (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            The same under the reference policy.
        advantages (`torch.FloatTensor` of shape `(B,)` or `(B, R)`):
            What each response (each token) is worth.
        num_items (`torch.Tensor`):
            Trained tokens of the whole generation batch, all processes.
    """

    rows: Rows
    rounds: list[Round]
    token_logps: torch.Tensor
    logps: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    advantages: torch.Tensor
    num_items: torch.Tensor


@dataclass
class LossOutputs:
    r"""
    A loss of an objective's own.

    Args:
        loss (`torch.Tensor`):
            Scalar, of this micro-batch: the trainer divides it by the number of accumulation steps.
        metrics (`dict[str, torch.Tensor]`, *optional*):
            Scalars to be logged.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    r"""
    Which tokens are masked, which of them are scored, and what becomes of their log-probabilities.

    Only [`Objective.rounds`] must be written; what else there is to say has these defaults:

    - `attentions`: kinds of attention it is for, of `"block"` and `"full"`.
    - `replays_rollout`: whether every trained token is scored once and in exactly the context it was committed in, so
      that rollout log-probabilities can be compared with the trainer's.
    - `num_views`: how many sets of rounds there are; update `i` on a rollout takes view `i % num_views`.
    - `causal`: whether scored tokens are predicted from the clean tokens before them, nothing being masked.
    - `step_map`: whether it reads the steps of a rollout: `"unused"`, `"optional"` or `"required"`.
    - `fills`: fine-tuning: whether EOS tokens that fill up a sequence are trained.
    - `loss_norm`: fine-tuning: what the loss is divided by where the config leaves that open.
    """

    attentions: ClassVar[tuple[str, ...]] = ("block", "full")
    replays_rollout: bool = False
    num_views: int = 1
    causal: ClassVar[bool] = False
    step_map: ClassVar[str] = "unused"
    fills: ClassVar[bool] = True
    loss_norm: ClassVar[str] = "token"

    def draw(self, rows: Rows, random: Random) -> dict[str, torch.Tensor]:
        """
        What is random about the rounds, each of shape `(B, ...)`: it becomes `rows.draws`. Called once per rollout
        (fine-tuning: per step).
        """
        return {}

    @abstractmethod
    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        """
        The rounds of a view, a pure function: it is called for the old, the reference and the current policy. Without
        a token to score, a list of rounds that score nothing.
        """

    def reduce(self, token_logps: torch.Tensor, rounds: list[Round]) -> torch.Tensor:
        """Log-probabilities `(K, B, R)` of the rounds as one matrix `(B, R)`: by default their weighted sum."""
        if all(r.loss_weight is None for r in rounds):
            return token_logps.sum(0)
        weights = [r.scored.to(token_logps.dtype) if r.loss_weight is None else r.loss_weight for r in rounds]
        return (token_logps * torch.stack(weights)).sum(0)

    def loss(self, inputs: LossInputs) -> LossOutputs | None:
        """A loss of its own. `None`: the one that `loss_type` names in the trainer's config, on the reduced matrix."""
        return None


@dataclass
class FunctionObjective(Objective):
    """A plain function `rows -> rounds` as an objective."""

    function: Callable[[Rows], list[Round]]

    def rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        return self.function(rows)


def make_objective(objective, known: dict[str, Callable[..., Objective]], **options) -> Objective:
    """
    The objective that `objective` stands for: a name in `known`, built with `options`, an instance, or a function of
    [`Rows`].
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str) and objective in known:
        return known[objective](**options)
    if callable(objective) and not isinstance(objective, type):
        return FunctionObjective(objective)
    raise ValueError(
        f"`objective` must be one of {sorted(known)}, an `Objective` or a function of `Rows` that returns rounds, but "
        f"is {objective!r}."
    )
