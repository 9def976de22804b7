"""Trainers whose logs are compared, and what they log: in this process, or with `torchrun -m` in several."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.trainers import TraceRLConfig, TraceRLTrainer
from dllm_trl.trainers.processes import end_processes

from .tiny_rl import ON_CPU, letter_reward, make_model, make_prompts, make_tokenizer


# What belongs to the run, not to the data
CLOCKS = ("runtime", "per_second", "step_time", "epoch", "total_flos", "model_preparation_time")
PAIRS = {
    "prompt": [f"{i}+{i % 7}=" + " " * (i % 4) for i in range(11)],
    "completion": ["x" * (1 + i * i % 23) for i in range(11)],
}
STEP_MAPS = {"step_map": [list(range(len(completion) + 1)) for completion in PAIRS["completion"]]}


def metrics_of(logs: dict) -> dict:
    return {k: v for k, v in logs.items() if isinstance(v, float | int) and not k.endswith(CLOCKS)}


def make_sft(folder: Path, family: str = "sdar", **options) -> DiffusionSFTTrainer:
    data = Dataset.from_dict(PAIRS | (STEP_MAPS if options.get("objective") == "trace" else {}))
    values = {"max_length": 64, "router_aux_loss_coef": 0.0, "logging_steps": 2, "shuffle_dataset": False}
    return DiffusionSFTTrainer(
        model=make_model(family),
        args=DiffusionSFTConfig(str(folder), disable_tqdm=True, **ON_CPU, **(values | options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
    )


def partial_reward(completions, log_metric, **kwargs):
    """Nothing for some; and a metric of its own."""
    log_metric("characters", sum(map(len, completions)) / len(completions))
    return [None if len(text) % 3 == 0 else reward for text, reward in zip(completions, letter_reward(completions))]


def make_rl(folder: Path, family: str = "sdar", rows: int = 7, **options) -> TraceRLTrainer:
    values = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 10,
        "remasking_strategy": "low_confidence_static",
        "denoising_steps": 2,
        "beta": 0.05,
        "overlong_slack": 0,
        "epsilon": 0.01,
        "logging_steps": 2,
        "router_aux_loss_coef": 0.0,
        "block_length": 4,
        "disable_tqdm": True,
        **ON_CPU,
    }
    model = folder / family
    with PartialState(cpu=True).main_process_first():
        if not model.exists():
            make_model(family).save_pretrained(model)
            make_tokenizer().save_pretrained(model)
    trainer = TraceRLTrainer(
        model=str(model),
        reward_funcs=[letter_reward, partial_reward],
        args=TraceRLConfig(str(folder), **(values | options)),
        train_dataset=make_prompts(rows),
        eval_dataset=make_prompts(rows),
    )
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():  # away from the reference
        parameter.data += 0.02 * torch.randn_like(parameter)
    return trainer


def evaluate(trainer, size: int | None = None) -> dict:
    """In batches of `size`. Metrics without those that nothing could be said of."""
    if size is not None:
        trainer.args.per_device_eval_batch_size = size
    return metrics_of(trainer.evaluate())


def train(trainer) -> list[dict]:
    trainer.train()
    return [metrics_of(entry) for entry in trainer.state.log_history]


def run_all(folder: Path, steps: int) -> dict:
    """What is compared across numbers of processes. Two processes have half of the accumulation `steps`."""
    evaluation = {"per_device_eval_batch_size": 4}
    training = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 1}
    cases = {
        "sft": evaluate(make_sft(folder, **evaluation)),
        "sft by sequence": evaluate(make_sft(folder, "llada", **evaluation)),
        "sft packed": evaluate(make_sft(folder, packing=True, max_length=40, per_device_eval_batch_size=2)),
        "sft training": train(
            make_sft(folder, max_steps=2, **training)
        ),  # at the end of an epoch rows are trained twice
        "rl": evaluate(make_rl(folder, loss_type="dapo", **evaluation)),
        "rl by row": evaluate(make_rl(folder, loss_type="grpo", rows=9, **evaluation)),
        "rl training": train(make_rl(folder, loss_type="dapo", max_steps=4, num_iterations=2, **training)),
    }
    for name in ("rl", "rl by row"):
        cases[name].pop("eval_characters")  # the reward function saw the repeated rows too
    return cases


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = run_all(folder, steps=2)
    trainer = make_sft(folder)
    if trainer.accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps(results))
    end_processes(trainer.accelerator)
