"""What each token of a response is worth over the steps of its trace, and the loss of the critic that judges them."""

from typing import NamedTuple

import torch


VALUE_LOSS_NORMS = ("token", "masked", "response")


class StepGAE(NamedTuple):
    r"""
    Returns and advantages of tokens, and those of the steps that they are made of. `S` is the largest number of steps
    that a response has.

    Args:
        returns, advantages (`torch.FloatTensor` of shape `(B, R)`):
            Of each trained token, 0 elsewhere.
        step_ids (`torch.LongTensor` of shape `(B, S)`):
            Distinct steps of each response in ascending order, -1 where it has no more.
        step_rewards, step_values, step_returns, step_advantages (`torch.FloatTensor` of shape `(B, S)`):
            Of each step, 0 where there is none.
    """

    returns: torch.Tensor
    advantages: torch.Tensor
    step_ids: torch.Tensor
    step_rewards: torch.Tensor
    step_values: torch.Tensor
    step_returns: torch.Tensor
    step_advantages: torch.Tensor


def step_places(step_map: torch.Tensor, trained: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Place `(B, R)` of each trained token's step among the `S` (at most) distinct steps that the trained tokens of its
    response have, and `S`, which is the place of all other tokens.
    """
    steps, order = step_map.masked_fill(~trained, torch.iinfo(step_map.dtype).max).sort(1)
    rises = (steps.diff(dim=1) > 0).long().cumsum(1)
    places = torch.zeros_like(order).scatter_(1, order, torch.nn.functional.pad(rises, (1, 0)))
    width = int(places[trained].max()) + 1 if trained.any() else 0
    return places.masked_fill(~trained, width), width


def outcome_token_rewards(rewards: torch.Tensor, step_map: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """`(B, R)`: the reward `(B,)` of each response on every token of its last trained step, 0 elsewhere."""
    last = step_map.masked_fill(~trained, -1).amax(1, keepdim=True)
    return rewards.unsqueeze(1) * (trained & (step_map == last))


def step_gae(
    step_map: torch.Tensor,
    trained: torch.Tensor,
    token_rewards: torch.Tensor,
    token_values: torch.Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    token_reward: str = "token",
) -> StepGAE:
    r"""
    Generalised advantage estimation over the denoising steps of a response, as in the [TraceRL
    paper](https://huggingface.co/papers/2509.06949). With `r*` and `V*`, the means of rewards and values over the
    trained tokens of a step,

        R*_t = r*_t + gamma R*_{t+1},  A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lambda A*_{t+1}

    and for each token `j` of step `t` the same with its own `r_j` and `V_j` in place of the means of its step.

    Args:
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Step that each token was committed in. Steps need not be consecutive.
        trained (`torch.BoolTensor` of shape `(B, R)`):
            Tokens that count. A response may have none.
        token_rewards, token_values (`torch.FloatTensor` of shape `(B, R)`):
            Reward, and what the critic expected, of each token.
        gamma, gae_lambda (`float`, *optional*, defaults to `1.0`):
            Discount, and how far rewards are trusted over values.
        token_reward (`str`, *optional*, defaults to `"token"`):
            What the `r_j` of a token is: its own reward (`"token"`) or the mean of its step (`"step_mean"`).

    Returns:
        [`StepGAE`]
    """
    if token_reward not in ("token", "step_mean"):
        raise ValueError(f'`token_reward` must be "token" or "step_mean", but is {token_reward!r}.')
    places, width = step_places(step_map, trained)
    # Behind the last step is one more, worth nothing. In float64 it does not matter in which order tokens are added
    zeros = torch.zeros(len(places), width + 1, dtype=torch.float64, device=places.device)
    counts = zeros.scatter_add(1, places, trained.double()).clamp(min=1)
    rewards, values = token_rewards.double() * trained, token_values.double() * trained
    r, v = (zeros.scatter_add(1, places, of_tokens) / counts for of_tokens in (rewards, values))
    returns, advantages = zeros.clone(), zeros.clone()
    for t in reversed(range(width)):
        returns[:, t] = r[:, t] + gamma * returns[:, t + 1]
        advantages[:, t] = r[:, t] - v[:, t] + gamma * v[:, t + 1] + gamma * gae_lambda * advantages[:, t + 1]

    def following(of_steps: torch.Tensor) -> torch.Tensor:
        return of_steps.gather(1, (places + 1).clamp(max=width))

    own = r.gather(1, places) if token_reward == "step_mean" else rewards
    token_returns = own + gamma * following(returns)
    token_advantages = own - values + gamma * following(v) + gamma * gae_lambda * following(advantages)
    ids = step_map.new_full(zeros.shape, -1).scatter_(1, places, step_map.masked_fill(~trained, -1))
    of_tokens = ((x * trained).to(token_values.dtype) for x in (token_returns, token_advantages))
    return StepGAE(*of_tokens, ids[:, :-1], *(x[:, :-1].to(token_values.dtype) for x in (r, v, returns, advantages)))


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """
    Loss of each value, of any shape: half the larger of two squared errors, that of the value itself and that of one
    which is no further than `epsilon` from the old value.
    """
    clipped = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def value_loss_weights(scored: torch.Tensor, norm: str, response_length: int) -> torch.Tensor:
    """
    Weight `(B, R)` of each token of `scored` in the loss of a batch of responses, before the sum of them is divided by
    their number (`norm="token"`: by that of their scored tokens): 1 (`"token"`), one over the scored tokens of its
    response (`"masked"`) or over `response_length` (`"response"`).
    """
    if norm == "response":
        return scored.double() / response_length
    return scored.double() / (scored.sum(1, keepdim=True).clamp(min=1) if norm == "masked" else 1)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    scored: torch.Tensor,
    epsilon: float = 0.2,
    norm: str = "token",
    response_length: int | None = None,
) -> torch.Tensor:
    r"""
    Clipped loss of a critic over a batch of responses.

    Args:
        values, old_values, returns (`torch.FloatTensor` of shape `(B, R)`):
            What the critic expects now, what it expected at the rollout, and what came of it.
        scored (`torch.BoolTensor` of shape `(B, R)`):
            Tokens that count.
        epsilon (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the old one before its gradient is cut off.
        norm (`str`, *optional*, defaults to `"token"`):
            `"token"`: the mean over all scored tokens. The mean over responses of, `"masked"`, the mean over their
            scored tokens or, `"response"`, the sum over these divided by `response_length`.
        response_length (`int`, *optional*):
            By default the width `R`.

    Returns:
        `torch.Tensor`: 0-d, with gradient.
    """
    if norm not in VALUE_LOSS_NORMS:
        raise ValueError(f"`norm` must be one of {VALUE_LOSS_NORMS}, but is {norm!r}.")
    weights = value_loss_weights(scored, norm, response_length or scored.size(1))
    losses = clipped_value_loss(values, old_values, returns, epsilon).masked_fill(~scored, 0.0)
    total = (losses * weights).sum()
    return (total / max(int(scored.sum()) if norm == "token" else len(scored), 1)).to(values.dtype)
