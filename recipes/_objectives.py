"""`--objective NAME`: which trainer, and so which arguments, belong to it."""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import yaml
from trl import TrlParser

from dllm_trl import (
    CoupledGRPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    RandomMaskGRPOTrainer,
    TraceRLConfig,
    TraceRLTrainer,
)
from dllm_trl.objectives import OBJECTIVES


# All others are DiffusionGRPOTrainer's
TRAINERS = {
    "coupled": CoupledGRPOTrainer,
    "diffu_grpo": RandomMaskGRPOTrainer,
    "random_mask": RandomMaskGRPOTrainer,
    "trace": TraceRLTrainer,
}


def trainer_of(args: DiffusionGRPOConfig) -> type[DiffusionGRPOTrainer]:
    """The trainer whose config `args` is."""
    return next(kind for kind in (*TRAINERS.values(), DiffusionGRPOTrainer) if kind.config_class is type(args))


def named(option: str, args: list[str]) -> str | None:
    """What a command line, or else its config, says of an option."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{option}", dest="value")
    parser.add_argument("--config")
    found, _ = parser.parse_known_args(args)
    if found.value is None and found.config is not None:
        return yaml.safe_load(Path(found.config).read_text()).get(option)
    return found.value


def find_objective(args: list[str]) -> tuple[str, type[DiffusionGRPOConfig]]:
    """The objective that a command line or its config names, by default TraceRL's, and the config of its trainer."""
    name = named("objective", args) or "trace"
    if name not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {sorted(OBJECTIVES)}, but is {name!r}.")
    return name, TRAINERS.get(name, DiffusionGRPOTrainer).config_class


def parse(parser: TrlParser, args: list[str]) -> tuple:
    """What the parser makes of a command line and its config, which may be one of TraceRL's for another objective."""
    *parsed, of_config, of_line = parser.parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    tracerls = {f"--{f.name}" for f in fields(TraceRLConfig)}
    if unknown := [name for name in of_config[::2] if name not in tracerls] + of_line:
        raise ValueError(f"The objective's trainer has no arguments {unknown}. `--help` lists those that it has.")
    if of_config:
        print(f"Only TraceRL has these settings of the config, they are left out: {', '.join(of_config[::2])}")
    return tuple(parsed)
