"""
Every objective of reinforcement learning from the same fine-tuned model, with equal rollouts (prompts, responses per
prompt, steps), on two tasks: the demo's word problems, which saturate, and sudoku of 4 x 4, which does not. For each:
the reward over training, greedy accuracy on held-out problems before and after, how far the gradients of two rollouts
agree at the first policy, and CPU seconds per step.

    python benchmarks/objectives.py --sides trace coupled --seeds 0 1 2    # adds what is missing to the results
    python benchmarks/objectives.py --validate                      # tries learning rates on the validation split
    python benchmarks/objectives.py --plot                                 # the table and the plots of what is there

Each run is a line of `benchmarks/results/objectives.jsonl`, and is not repeated while it stands there.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import TrainerCallback

from dllm_trl import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    TraceRLConfig,
    TraceRLTrainer,
)
from dllm_trl.evaluation import evaluate_accuracy
from dllm_trl.generation import generate_rollouts
from dllm_trl.rewards import math_reward


HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "recipes")]

import _sudoku  # noqa: E402
import _word_problems  # noqa: E402


RESULTS = HERE / "results" / "objectives.jsonl"
TRIED = RESULTS.with_stem("objectives_validation")
WEIGHTS = HERE.parent / "runs" / "objectives"  # fine-tuned models, kept from one call to the next
RATES = (5e-5, 1e-4, 2e-4)  # tried on the validation split


@dataclass
class Task:
    """
    Where problems, model and reward come from. `sft` are settings of fine-tuning, `length` the tokens of a response,
    `learning_rate` that of all sides: `None` takes each side's own.
    """

    name: str
    sft: dict
    length: int
    learning_rate: float | None = None

    def problems(self, split: str, size: int, seed: int = 0, careless: float = 0.0):
        if self.name == "words":
            return _word_problems.make_problems(split, size, seed, careless)
        return _sudoku.make_puzzles(split, size, seed, careless)

    @property
    def module(self):
        return _word_problems if self.name == "words" else _sudoku

    @property
    def reward(self):
        return math_reward if self.name == "words" else _sudoku.sudoku_reward


SFT = {"per_device_train_batch_size": 64, "adam_beta2": 0.98, "lr_scheduler_type": "linear", "warmup_steps": 30}
SFT |= {"max_length": 128, "noise_eps": 0.5}
TASKS = {
    "words": Task("words", SFT | {"max_steps": 500, "learning_rate": 6e-3, "careless": 0.6}, 40, 2e-4),
    "sudoku": Task("sudoku", SFT | {"max_steps": 400, "learning_rate": 4e-3, "careless": 0.6}, 20),
}
OFF = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
OFF |= {"disable_tqdm": True, "logging_steps": 1}


@dataclass
class Side:
    """One way to train: the config's arguments beside those that all sides share, and the learning rate in sudoku."""

    options: dict
    learning_rate: float = 2e-4
    trainer: tuple = (DiffusionGRPOTrainer, DiffusionGRPOConfig)


TRACE = (TraceRLTrainer, TraceRLConfig)
ADAPTER = {"value_model": "adapter", "value_learning_rate": 4e-3, "value_epochs": 3}
SIDES = {
    "trace": Side({}, trainer=TRACE),
    "trace, value copy": Side({"value_model": "copy", "value_learning_rate": 1e-3}, trainer=TRACE),
    "trace, value adapter": Side(ADAPTER, trainer=TRACE),
    "coupled": Side({"objective": "coupled", "scale_rewards": "leave_one_out"}, 1e-4),
    "random_mask": Side({"objective": "random_mask"}, 1e-4),
    "diffu_grpo": Side({"objective": "diffu_grpo", "scale_rewards": "none"}),
    "spg": Side({"objective": "spg"}),
    "wd1": Side({"objective": "wd1"}),
    "espo": Side({"objective": "espo"}),
    "bgpo": Side({"objective": "bgpo"}, 1e-4),
    "dipo": Side({"objective": "dipo"}),
    "gdpo": Side({"objective": "gdpo", "scale_rewards": "none"}, 1e-4),
    "stable_drl": Side({"objective": "stable_drl", "scale_rewards": "none"}, 1e-4),
    "just_grpo": Side({"objective": "just_grpo"}),
    "block_reveal": Side({"objective": "block_reveal"}),
    "agrpo": Side({"objective": "agrpo", "scale_rewards": "none", "objective_kwargs": {"num_samples": 8}}),
    "ebpo": Side({"objective": "ebpo", "objective_kwargs": {"num_samples": 4}}, 1e-4),
    "egspo": Side({"objective": "egspo"}),
    "lightning_rl": Side({"objective": "lightning_rl", "objective_kwargs": {"slack": 0}}),
}


class Gradients(TrainerCallback):
    """Keeps the gradient of every step, flat."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parts = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.seen.append(torch.cat(parts).clone())

    def agreement(self) -> float:
        """Mean cosine of the gradients of two rollouts: `|g|^2 / (|g|^2 + variance)` for a mean gradient g."""
        every = torch.nn.functional.normalize(torch.stack(self.seen), dim=1)
        count = len(every)
        return ((every @ every.T).sum() - count).item() / (count * (count - 1))


@cache
def fine_tuned(name: str, seed: int) -> tuple:
    """Model, tokenizer and weights that every side of a task and a seed starts from."""
    task, sft = TASKS[name], dict(TASKS[name].sft)
    tokenizer = task.module.make_tokenizer()
    model = task.module.make_model(tokenizer, seed)
    kept = WEIGHTS / f"{name}-{seed}.pt"
    if kept.exists():
        return model, tokenizer, torch.load(kept)
    problems = task.problems("train", 8000, seed, sft.pop("careless"))
    problems = problems.select_columns(["prompt", "completion"])
    with TemporaryDirectory() as folder:
        args = DiffusionSFTConfig(folder, seed=seed, **sft, **OFF)
        DiffusionSFTTrainer(model=model, args=args, train_dataset=problems, processing_class=tokenizer).train()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    torch.save(weights, kept)
    return model, tokenizer, weights


def accuracy(model, tokenizer, task: Task, split: str, size: int) -> float:
    problems = task.problems(split, size).remove_columns("completion")
    if task.name == "words":
        return evaluate_accuracy(model, tokenizer, problems).accuracy
    ids = tokenizer(list(problems["prompt"]))["input_ids"]
    texts = tokenizer.batch_decode(
        generate_rollouts(model.eval(), ids, model.generation_config).completion_ids, skip_special_tokens=True
    )
    return statistics.mean(_sudoku.sudoku_reward(texts, list(problems["puzzle"])))


def make_trainer(name: str, task: Task, seed: int, folder: str, **settings):
    """A trainer of a side, from the fine-tuned weights."""
    side = SIDES[name]
    model, tokenizer, weights = fine_tuned(task.name, seed)
    model.load_state_dict(weights)
    kind, config = side.trainer
    shared = {"num_generations": 8, "per_device_train_batch_size": 64, "max_completion_length": task.length}
    shared |= {"learning_rate": task.learning_rate or side.learning_rate, "lr_scheduler_type": "constant"}
    args = config(folder, seed=seed, **(shared | side.options | settings), **OFF)
    problems = task.problems("train", 2000, seed + 1).remove_columns("completion")
    trainer = kind(
        model=model, reward_funcs=task.reward, args=args, train_dataset=problems, processing_class=tokenizer
    )
    return trainer


def gradient_agreement(name: str, task: Task, seed: int, steps: int) -> float:
    """Of one step at the first policy: the weights stand still for `steps` rollouts."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(name, task, seed, folder, max_steps=steps, learning_rate=0.0, max_grad_norm=0.0)
        gradients = Gradients(trainer.model)
        trainer.add_callback(gradients)
        trainer.train()
    return gradients.agreement()


def run(name: str, task: Task, seed: int, args: argparse.Namespace, **settings) -> dict:
    """Trains a side and says how it went."""
    model, tokenizer, weights = fine_tuned(task.name, seed)
    model.load_state_dict(weights)
    split = "validation" if settings else "heldout"
    before = accuracy(model, tokenizer, task, split, args.problems)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(name, task, seed, folder, max_steps=args.steps, **settings)
        start = time.process_time()
        trainer.train()
        seconds = (time.process_time() - start) / args.steps
        history = trainer.state.log_history
    row = {"side": name, "task": task.name, "seed": seed, "steps": args.steps, "before": before}
    row["after"] = accuracy(model, tokenizer, task, split, args.problems)
    row["rewards"] = [round(log["reward"], 4) for log in history if "reward" in log]
    row["seconds_per_step"] = round(seconds, 3)
    for key in ("value/advantage_variance", "value/advantage_variance_without", "value/explained_variance"):
        values = [log[key] for log in history if key in log]
        if values:
            row[key] = round(statistics.mean(values), 5)
    return row


def validate(args: argparse.Namespace) -> None:
    """Tries the learning rates, for one seed that is not among those of the results."""
    for task in map(TASKS.get, args.tasks):
        for name in args.sides:
            for rate in RATES:
                row = run(name, task, 100, args, learning_rate=rate)
                found = {key: row[key] for key in ("side", "task", "before", "after", "seconds_per_step")}
                add_line(TRIED, found | {"learning_rate": rate, "seed": row["seed"], "steps": row["steps"]})


def add_line(file: Path, row: dict) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print({key: value for key, value in row.items() if key != "rewards"}, flush=True)


def read_results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def plot(args: argparse.Namespace) -> None:
    """A table of all results, and per task the reward curves with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = defaultdict(list)
    for row in read_results():
        grouped[row["task"], row["side"]].append(row)
    print("| task | objective | before, % | after, % | minus trace, each seed | gradients agree | CPU s per step |")
    print("|---|---|---|---|---|---|---|")
    for (task, name), rows in sorted(
        grouped.items(), key=lambda x: (x[0][0], -statistics.mean(r["after"] for r in x[1]))
    ):
        agreement = [row["gradient_agreement"] for row in rows if "gradient_agreement" in row]
        trace = {row["seed"]: row["after"] for row in grouped[task, "trace"]}
        minus = [100 * (row["after"] - trace[row["seed"]]) for row in sorted(rows, key=lambda row: row["seed"])]
        figures = [spread([row["before"] for row in rows]), spread([row["after"] for row in rows])]
        figures.append(", ".join(f"{points:+.1f}" for points in minus))
        figures.append(f"{statistics.mean(agreement):.2f}" if agreement else "")
        figures.append(f"{statistics.median(row['seconds_per_step'] for row in rows):.2f}")
        print(f"| {task} | {name} | {' | '.join(figures)} |")
    for task in TASKS:
        sides = [(name, grouped[task, name]) for name in SIDES if grouped[task, name]]
        if not sides:
            continue
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        for number, (name, rows) in enumerate(sides):
            curves = torch.tensor([row["rewards"] for row in rows])
            curves = curves.unfold(1, 5, 1).mean(-1)  # over 5 steps
            steps, color = range(5, 5 + curves.size(1)), plt.get_cmap("tab20")(number % 20)
            axes.plot(steps, curves.mean(0), color=color, label=name, linewidth=1.6)
            axes.fill_between(steps, curves.amin(0), curves.amax(0), color=color, alpha=0.08)
        axes.set(title=f"{task}: mean reward of 5 steps", xlabel="Optimizer step", ylabel="Reward", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        figure.savefig(args.images / f"objectives_{task}.png", dpi=130)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, of 64 responses each")
    parser.add_argument("--noise_steps", type=int, default=8, help="rollouts whose gradients are compared")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plot:
        plot(args)
    elif args.validate:
        validate(args)
    else:
        for seed in args.seeds:
            for task in map(TASKS.get, args.tasks):
                for name in args.sides:
                    if any((r["side"], r["task"], r["seed"]) == (name, task.name, seed) for r in read_results()):
                        continue
                    row = run(name, task, seed, args)
                    row["gradient_agreement"] = round(gradient_agreement(name, task, seed, args.noise_steps), 4)
                    add_line(RESULTS, row)


if __name__ == "__main__":
    main()
