"""Where responses come from. The trainer asks for them here; what decodes them is its own business."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Protocol

import torch
from accelerate.utils import is_peft_model
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ..generation import DiffusionGenerationConfig, generate_rollouts
from ..generation.processors import OFF
from ..generation.sharded import whole_weights
from ..objectives import Objective
from ..types import DiffusionRollout
from .strategy_arguments import StrategyArguments


class Rollouts(Protocol):
    """
    A source of responses: the engine of this package in the trainer's own process, a server, a recording.

    `exact` says whether its log-probabilities are the numbers that the trainer computes from the same weights.
    """

    exact: bool

    def sync(self, step: int) -> None:
        """Called before each rollout in training, at optimizer step `step`: new weights go where they are needed."""

    def generate(
        self, prompts: list[list[int]], parameters: DiffusionGenerationConfig, seed: int, first_row: int
    ) -> DiffusionRollout:
        """
        A response to each prompt. What row `i` draws is a function of `(seed, first_row + i)`, so that it depends on
        no other row.
        """


class EngineRollouts:
    """Decodes in the trainer's process with the weights it trains, so that nothing is copied."""

    exact = True

    def __init__(self, trainer):
        self.trainer = trainer

    def sync(self, step: int) -> None:
        pass  # the weights are the trainer's own

    def generate(
        self, prompts: list[list[int]], parameters: DiffusionGenerationConfig, seed: int, first_row: int
    ) -> DiffusionRollout:
        trainer, args = self.trainer, self.trainer.args
        with (
            profiling_context(trainer, "generate_rollouts"),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            whole_weights(model),
            trainer.accelerator.autocast(),
            naming_the_run(args.output_dir, trainer.state.global_step),
        ):
            return generate_rollouts(
                model,
                prompts,
                parameters,
                num_slots=args.num_slots,
                seed=seed,
                index_offset=first_row,
                show_progress=trainer.is_world_process_zero() and not args.disable_tqdm,
                tokenizer=trainer._tokenizer,
                record_entropies=trainer.objective.reads_entropies,
            )


def check_rollout(rollout: DiffusionRollout, objective: Objective) -> None:
    """Raises if the source of `rollout` left out what `objective` reads of it."""
    if objective.reads_entropies and rollout.entropies is None:
        raise ValueError(
            f"`objective` ({type(objective).__name__}) reads the entropies of the rollout, but `rollouts` returned "
            "one without `entropies`. Record them (`generate_rollouts(..., record_entropies=True)`), or use another "
            "objective."
        )


def reward_arguments(rollout: DiffusionRollout) -> list[dict[str, float | int]]:
    """What reward functions are told of each response, beside the columns of its example."""
    forwards, committed = rollout.num_forward_passes, (rollout.step_map >= 0).sum(1)
    speed = committed / forwards.clamp(min=1)
    return [
        {"tokens_per_forward": one, "num_forward_passes": number}
        for one, number in zip(speed.tolist(), forwards.tolist(), strict=True)
    ]


@contextmanager
def naming_the_run(output_dir: str, step: int) -> Iterator[None]:
    """Context in which logits that are NaN say which weights gave them."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"Rollout with the weights after optimizer step {step} of the run in `output_dir={output_dir!r}`: {error}"
        ) from error


def make_parameters(trainer) -> DiffusionGenerationConfig:
    """
    All of sampling comes from the trainer's config, all else from there, from the objective or from the checkpoint.
    """
    wanted = trainer.objective.decoding(trainer.block_length)
    extra = dict(trainer.args.generation_kwargs or {})
    values = OFF | {
        "max_new_tokens": trainer.max_completion_length,
        "do_sample": True,
        "temperature": trainer.temperature,
        "top_k": trainer.top_k,
        "top_p": trainer.top_p,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        "pad_token_id": trainer._tokenizer.pad_token_id,
        "bos_token_id": trainer._tokenizer.bos_token_id,
        "eos_token_id": trainer.eos_token_ids,
        "mask_token_id": trainer.mask_token_id,
        "block_length": trainer.block_length,
        "denoising_steps": trainer.args.denoising_steps,
        "remasking_strategy": trainer.args.remasking_strategy,
        "cache": trainer.args.cache,
    }
    values |= {field.name: getattr(trainer.args, field.name) for field in fields(StrategyArguments)}
    values |= {name: value for name, value in wanted.items() if values.get(name) is None}
    values["denoising_steps"] = values["denoising_steps"] or min(trainer.block_length, trainer.max_completion_length)
    config = DiffusionGenerationConfig(**(values | extra))
    model = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    config, _ = model._resolve_generation_config(config, trainer._tokenizer)
    return config


def seed_of(args, mode: str) -> int:
    """What the rollouts of training or of evaluation draw from, and an objective for them."""
    given = (args.generation_kwargs or {}).get("seed")
    seed = f"{args.seed if given is None else given} {mode}"
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
