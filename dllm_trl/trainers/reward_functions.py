"""How reward functions are called: their failures name them, and lists that they return are set aside."""

import functools
import math
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from torch import nn
from trl.trainer.utils import is_async_callable

from .advantages import is_overlong
from .process_rewards import as_list, check_lists, split_lists, summarize
from .rollouts import reward_arguments
from .trl_loss import temporarily


logger = get_logger(__name__)


class _Naming:
    """Context in which an error says which reward function raised it, and what that was called with."""

    def __init__(self, name: str, arguments: list[str]):
        self.name, self.arguments = name, arguments

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception):
            raise RuntimeError(
                f"`reward_funcs`: the reward function '{self.name}' raised {kind.__name__}: {error}. It was called "
                f"with the keyword arguments {self.arguments}. Fix the function, or give the dataset the columns it "
                "needs."
            ) from error


def _check_rewards(name: str, rewards, lists: list) -> list:
    rewards = list(rewards)
    lists[:] = [as_list(reward) for reward in rewards]
    parts = [[reward] if one is None else one for reward, one in zip(rewards, lists, strict=True)]
    values = [[0.0 if part is None else float(part) for part in one] for one in parts]
    if any(math.isinf(value) for one in values for value in one):
        raise ValueError(f"'{name}' in `reward_funcs` returned an infinite reward. Return a number, or `None`.")
    undefined = sum(any(map(math.isnan, one)) for one in values)
    if undefined:
        logger.warning(
            f"The reward function '{name}' in `reward_funcs` returned NaN for {undefined} of {len(values)} "
            "completions, which are treated as `None`: no reward of this function. Return a number, or `None` where "
            "it does not apply."
        )
    return [reward if one is None else summarize(one) for reward, one in zip(rewards, lists, strict=True)]


def guard_reward(name: str, function: Callable, lists: list[list | None]) -> Callable:
    """
    A reward function for TRL, whose failures name it, and whose NaNs are pointed out. In place of a list it returns
    the mean; the lists themselves are put into `lists`, with `None` for each response that got a number.
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def guarded(**kwargs):
            with _Naming(name, sorted(kwargs)):
                return _check_rewards(name, await function(**kwargs), lists)
    else:

        @functools.wraps(function)
        def guarded(**kwargs):
            with _Naming(name, sorted(kwargs)):
                return _check_rewards(name, function(**kwargs), lists)

    return guarded


class RewardFunctionsMixin:
    """
    For a [`~trl.GRPOTrainer`], whose reward functions return a number for each response: ours may return a list. TRL
    computes its advantages from the numbers. Mixed in before the trainer's class.
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        told = reward_arguments(self._generation.rollout)
        inputs = [example | known for example, known in zip(inputs, told, strict=True)]
        lists = [[] for _ in self.reward_funcs]
        guarded = [
            function if isinstance(function, nn.Module) else guard_reward(name, function, into)
            for name, function, into in zip(self.reward_func_names, self.reward_funcs, lists, strict=True)
        ]
        with temporarily(self, reward_funcs=guarded):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        steps, chunk_length = self._generation.rollout.step_map, self.args.reward_chunk_length
        check_lists(self.reward_func_names, lists, completion_ids_list, steps, chunk_length)
        numbers, scores = split_lists(self.accelerator, rewards, lists, self.reward_weights)
        if self.args.overlong_slack is not None:
            lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
            ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids_list], device=rewards.device)
            overlong = is_overlong(lengths, ended, self.max_completion_length, self.args.overlong_slack)
            self._note_rows({"completions/overlong_ratio": overlong}, self._generation.counted)
            overlong = self.accelerator.gather(overlong).unsqueeze(1)
            rewards, numbers = (torch.where(overlong & ~x.isnan(), 0.0, x) for x in (rewards, numbers))
            scores = None if scores is None else torch.where(overlong & ~scores.isnan(), 0.0, scores)
        self._generation.rewards, self._generation.numbers, self._generation.lists = rewards, numbers, scores
        return numbers
