"""What an objective is, for fine-tuning and for reinforcement learning alike. Tensors only."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

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
class Outcome:
    r"""
    What a rollout has come to, before anybody says what it is worth. `N` are the rows of all processes, `B` those of
    this one.

    Args:
        rewards (`torch.FloatTensor` of shape `(N, F)`):
            A reward of each of `F` functions, NaN where one gave none, a mean where one gave a list.
        total (`torch.FloatTensor` of shape `(N,)`):
            Their weighted sum, NaN where none gave one.
        advantages (`torch.FloatTensor` of shape `(N,)`):
            What TRL makes of it (`scale_rewards`), of that part which came as numbers.
        num_generations (`int`):
            Responses per group; siblings are adjacent.
        mine (`slice`):
            This process's rows among the `N`.
        rows ([`Rows`]):
            This process's responses.
        values (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            What a critic expected of each token.
        token_rewards (`torch.FloatTensor` of shape `(B, R)`, *optional*):
            Rewards that came as lists, normalised, on tokens; `advantages` know nothing of them. `None`: all rewards
            are numbers.
        numbers (`torch.FloatTensor` of shape `(N,)`, *optional*):
            `total` without those that came as lists, NaN where nothing is left. `None`: all rewards are numbers.
        counted (`torch.BoolTensor` of shape `(N,)`, *optional*):
            Rows of which anything is scored: no repeats, not truncated where that rules them out, not dropped.
        num_trained, lengths, num_forward_passes (`torch.LongTensor` of shape `(N,)`, *optional*):
            Of each response: tokens that are trained unless it is dropped, tokens up to and including EOS, and
            denoising forwards that decoded it.
        limit (`int`, *optional*):
            Tokens that a response may have.
        completed (`torch.FloatTensor` of shape `(N, K)`, *optional*):
            Total rewards of the `K` canvases of [`Objective.completes`], NaN where there was nothing to complete.
    """

    rewards: torch.Tensor
    total: torch.Tensor
    advantages: torch.Tensor
    num_generations: int
    mine: slice
    rows: Rows
    values: torch.Tensor | None = None
    token_rewards: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    num_trained: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    num_forward_passes: torch.Tensor | None = None
    limit: int | None = None
    completed: torch.Tensor | None = None


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
        num_tokens (`torch.Tensor`):
            Scored tokens of a micro-batch, on average over those of an optimizer step and over processes: sums over
            tokens that are divided by it add up to the mean over all tokens of the step.
        epsilon_low, epsilon_high (`float`):
            `epsilon` and `epsilon_high` of the trainer's config: the ratio is clipped to `[1 - low, 1 + high]`.
        beta (`float`):
            Weight of the KL term in the trainer's config.
        batch_weights (`torch.FloatTensor` of shape `(B,)`, *optional*):
            Softmax of [`Objective.log_weights`] over all rows of the optimizer step, times their number.
        num_trained (`torch.Tensor`, *optional*):
            As `num_tokens`, of all trained tokens, whether this view scores them or not.
        notes (`dict[str, torch.Tensor]`, each of shape `(B, ...)`, *optional*):
            What [`Objective.notes`] kept of the rollout's outcome.
    """

    rows: Rows
    rounds: list[Round]
    token_logps: torch.Tensor
    logps: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    advantages: torch.Tensor
    num_tokens: torch.Tensor
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    batch_weights: torch.Tensor | None = None
    num_trained: torch.Tensor | None = None
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> torch.Tensor:
        """Tokens `(B, R)` that some round scores."""
        return any_scored(self.rounds)

    @property
    def lengths(self) -> torch.Tensor:
        """Trained tokens `(B,)` of each response: up to and including the first EOS."""
        return self.rows.trained.sum(1)


def any_scored(rounds: list[Round]) -> torch.Tensor:
    """Tokens `(B, R)` that at least one of `rounds` scores."""
    return functools.reduce(torch.logical_or, [one.scored for one in rounds])


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
    - `partial`: whether a view may leave trained tokens unscored, so that the scored ones have to be counted.
    - `needs_old`: whether log-probabilities of the policy that decoded the rollout are needed even while its weights
      are those that are trained.
    - `has_ratio`: whether its loss compares with that policy at all.
    - `has_kl`: whether its loss has a KL term, which `beta` in the trainer's config weighs.
    - `token_advantages`: whether a loss of its own takes an advantage for each token. Else it gets one for each
      response, and where tokens differ their mean.
    - `causal`: whether scored tokens are predicted from the clean tokens before them, nothing being masked.
    - `reads_entropies`: whether it reads `rows.entropies`, which rollouts record only when asked.
    - `step_map`: whether it reads the steps of a rollout: `"unused"`, `"optional"` or `"required"`.
    - `fills`: fine-tuning: whether EOS tokens that fill up a sequence are trained.
    - `loss_norm`: fine-tuning: what the loss is divided by where the config leaves that open.
    """

    attentions: ClassVar[tuple[str, ...]] = ("block", "full")
    replays_rollout: bool = False
    num_views: int = 1
    partial: ClassVar[bool] = True
    needs_old: ClassVar[bool] = False
    has_ratio: ClassVar[bool] = True
    has_kl: ClassVar[bool] = True
    token_advantages: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    reads_entropies: bool = False
    step_map: ClassVar[str] = "unused"
    fills: ClassVar[bool] = True
    loss_norm: str = "token"

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

    def old_rounds(self, rows: Rows, view: int = 0) -> list[Round]:
        """The rounds that the old policy is scored on for a view: by default the view's own."""
        return self.rounds(rows, view)

    def decoding(self, block_length: int) -> dict[str, Any]:
        """Parameters of decoding that this objective wants where the trainer's config leaves them open."""
        return {}

    def advantages(self, values: torch.Tensor, outcome: Outcome) -> torch.Tensor:
        """
        What becomes of the advantages `(N,)` of all rows of a rollout. By default nothing; `(B, R)`: one for each
        token of this process.
        """
        return values

    def completes(self, rows: Rows) -> list[torch.Tensor]:
        """
        Positions `(B, R)` that are hidden from each of `K` copies of the responses, which are then completed greedily
        and rewarded: `outcome.completed`. With block attention the completion ends with the first block of them. By
        default there are none.
        """
        return []

    def keeps(self, outcome: Outcome) -> torch.Tensor:
        """Responses `(N,)` that count in training; nothing of the others is scored. By default all."""
        return torch.ones_like(outcome.total, dtype=torch.bool)

    def notes(self, outcome: Outcome) -> dict[str, torch.Tensor]:
        """What the loss reads of the outcome as `inputs.notes`, each of shape `(N, ...)`."""
        return {}

    def reduce(self, token_logps: torch.Tensor, rounds: list[Round]) -> torch.Tensor:
        """
        Log-probabilities `(K, B, R)` of the rounds as one matrix `(B, R)`: by default their weighted sum. An objective
        with a loss of its own may make anything of them whose first dimension is the rows.
        """
        if all(r.loss_weight is None for r in rounds):
            return token_logps.sum(0)
        weights = [r.scored.to(token_logps.dtype) if r.loss_weight is None else r.loss_weight for r in rounds]
        return (token_logps * torch.stack(weights)).sum(0)

    def log_weights(self, inputs: LossInputs) -> torch.Tensor | None:
        """
        Logarithms `(B,)` of weights that are normalised over all rows of an optimizer step before the first of its
        losses, which takes one more forward pass without gradient. `None`: there are no such weights.
        """
        return None

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
    if isinstance(objective, str) and objective in known:
        names = [f.name for f in fields(known[objective]) if f.init]
        if unknown := sorted(options.keys() - set(names)):
            raise ValueError(f"`objective={objective!r}` has no option {unknown}. Its options: {names}.")
        return known[objective](**options)
    if options:
        raise ValueError(f"Options {sorted(options)} are for an `objective` that is given by its name.")
    if isinstance(objective, Objective):
        return objective
    if callable(objective) and not isinstance(objective, type):
        return FunctionObjective(objective)
    raise ValueError(
        f"`objective` must be one of {sorted(known)}, an `Objective` or a function of `Rows` that returns rounds, but "
        f"is {objective!r}."
    )
