"""Reward functions by the names that a command line can give."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from dllm_trl.rewards import format_reward, math_reward


REWARDS = {"math": math_reward, "format": format_reward}


def find_rewards(names: list[str]) -> list[Callable | str]:
    """The reward functions of those names; a reward model stays a name, which TRL loads."""
    return [REWARDS[name] if name in REWARDS else _find_reward(name) for name in names]


def _find_reward(name: str) -> Callable | str:
    if "/" in name or Path(name).is_dir():
        return name
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"`reward_funcs` has {name!r}, which is neither one of {sorted(REWARDS)}, nor the dotted path of a "
            "function such as 'my_module.my_reward', nor a reward model ('owner/name' or a folder)."
        )
    sys.path.insert(0, os.getcwd())  # the module may lie where the user is, as in TRL's scripts
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not
        raise ValueError(
            f"`reward_funcs` has {name!r}, but there is no module {error.name!r}. Run the recipe from the folder "
            "it lies in, or install it."
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"`reward_funcs` has {name!r}, but the module {module!r} has no function {function!r}.")
    return found


def check_answers(reward_funcs: list[Callable | str], dataset: Dataset) -> None:
    """Our own rewards say what they need of a dataset when asked about no completion at all."""
    for reward in reward_funcs:
        if reward in REWARDS.values():
            reward(prompts=[], completions=[], **{name: [] for name in dataset.column_names if name != "prompt"})
