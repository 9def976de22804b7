"""
The recipes' default: block SFT of a tiny model to a mediocre one, TraceRL (or what `--objective` names) to a good one,
and how good each is.
"""

import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # draws into files, with or without a display

import matplotlib.pyplot as plt
import torch
import yaml
from _objectives import find_objective, named, trainer_of
from _word_problems import make_model, make_problems, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from trl import TrlParser

from dllm_trl import DiffusionGRPOConfig, DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.evaluation import evaluate_accuracy
from dllm_trl.generation import generate_rollouts
from dllm_trl.generation.trace_viewer import save_trace_html
from dllm_trl.rewards import math_reward


# TRL's configs and trainers still go by the old name
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

CONFIGS = Path(__file__).parent / "configs" / "tiny"
AVERAGED_STEPS = 10  # in the smooth line of the reward curve
NUM_TRACES = 8  # problems in the viewer


@dataclass
class DemoArguments:
    """What the demo takes beside the arguments of the trainer's config."""

    careless: float = field(
        default=0.6, metadata={"help": "Share of the subtraction problems that the SFT solutions solve by adding."}
    )
    sft_steps: int | None = field(default=None, metadata={"help": "Steps of SFT. By default those of sft.yaml."})
    sft_problems: int = field(default=8000, metadata={"help": "Problems with solutions for SFT."})
    rl_problems: int = field(default=4000, metadata={"help": "Problems for reinforcement learning."})
    eval_problems: int = field(default=600, metadata={"help": "Held-out problems, at most 600."})
    eval_split: str = field(default="heldout", metadata={"help": "'heldout', or 'validation' to try out settings."})


class QuietProgress(ProgressCallback):
    """A progress bar with the mean reward, or the loss, instead of lines between its updates."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        name = "reward" if "reward" in logs else "loss"
        if self.training_bar is not None and name in logs:
            self.training_bar.set_postfix({name: f"{logs[name]:.3f}"})


def use_one_thread() -> None:
    """The tensors are too small for more, and threads that wait for each other stall where another program runs."""
    torch.set_num_threads(1)


def train_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, demo_args: DemoArguments, args: DiffusionSFTConfig
) -> None:
    problems = make_problems("train", demo_args.sft_problems, args.seed, demo_args.careless).remove_columns("answer")
    trainer = DiffusionSFTTrainer(model=model, args=args, train_dataset=problems, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    trainer.train()


def train_rl(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, demo_args: DemoArguments, args: DiffusionGRPOConfig
) -> list[float]:
    """Returns the mean reward of each step."""
    problems = make_problems("train", demo_args.rl_problems, args.seed + 1).remove_columns("completion")
    trainer = trainer_of(args)(
        model=model, reward_funcs=math_reward, args=args, train_dataset=problems, processing_class=tokenizer
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


def plot_rewards(path: Path, method: str, rewards: list[float], responses: int, before: float, after: float) -> None:
    """Reward over training, with the accuracy on held-out problems at both ends."""
    averages = [
        sum(rewards[max(i - AVERAGED_STEPS + 1, 0) : i + 1]) / min(i + 1, AVERAGED_STEPS) for i in range(len(rewards))
    ]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(rewards) + 1)
    axes.plot(
        steps, rewards, color="tab:blue", alpha=0.3, linewidth=1, label=f"sampled responses, {responses} per step"
    )
    axes.plot(steps, averages, color="tab:blue", linewidth=2, label=f"their mean over {AVERAGED_STEPS} steps")
    axes.plot([0, len(rewards)], [before, after], "o", color="tab:orange", label="held-out problems, greedy decoding")
    axes.set(
        title=f"{method} on word problems, from a careless SFT model",
        xlabel="Optimizer step",
        ylabel="Reward (share of right answers)",
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(
    objective: str,
    value_model: str | None,
    demo_args: DemoArguments,
    sft_args: DiffusionSFTConfig,
    args: DiffusionGRPOConfig,
) -> dict:
    start = time.perf_counter()
    method = ("TraceRL" if objective == "trace" else objective) + (f", {value_model} as critic" if value_model else "")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    heldout = make_problems(demo_args.eval_split, demo_args.eval_problems).remove_columns("completion")

    print(f"\n1/4  Block SFT of a random SDAR model with {model.num_parameters():,} parameters")
    began = time.perf_counter()
    train_sft(model, tokenizer, demo_args, sft_args)
    seconds_sft = time.perf_counter() - began

    print("\n2/4  Accuracy after SFT, on problems it has never seen")
    sft = evaluate_accuracy(model, tokenizer, heldout)

    print(f"\n3/4  {method}")
    began = time.perf_counter()
    rewards = train_rl(model, tokenizer, demo_args, args)
    seconds_rl = time.perf_counter() - began

    print(f"\n4/4  Accuracy after {method}, on the same problems")
    rl = evaluate_accuracy(model, tokenizer, heldout)

    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    responses = args.per_device_train_batch_size * args.gradient_accumulation_steps
    plot_rewards(output_dir / "reward.png", method, rewards, responses, sft.accuracy, rl.accuracy)
    shown = heldout[:NUM_TRACES]
    prompts = tokenizer.apply_chat_template(shown["prompt"], add_generation_prompt=True)["input_ids"]
    save_trace_html(
        output_dir / "trace.html",
        generate_rollouts(model, prompts, model.generation_config, seed=0),
        tokenizer,
        prompts=[messages[0]["content"] for messages in shown["prompt"]],
        answers=shown["answer"],
        rewards=[record["reward"] for record in rl.records[:NUM_TRACES]],
        title=f"Word problems after {method}",
    )
    summary = {
        "objective": objective,
        "value_model": value_model,
        "accuracy_sft": sft.accuracy,
        "accuracy_rl": rl.accuracy,
        "tokens_per_forward": rl.tokens_per_forward,
        "tokens_per_forward_sft": sft.tokens_per_forward,
        "seconds_sft": round(seconds_sft, 1),
        "seconds_rl": round(seconds_rl, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "eval_problems": rl.num_problems,
        "eval_split": demo_args.eval_split,
        "seed": args.seed,
        "rl_steps": len(rewards),
        "responses_per_step": responses,
        "parameters": model.num_parameters(),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    print(f"\nRight answers on {rl.num_problems} held-out problems (greedy decoding)")
    for stage, report, seconds in (("SFT", sft, seconds_sft), (method, rl, seconds_rl)):
        decoding = f"{report.tokens_per_forward:.2f} tokens per forward"
        print(f"  after {stage:<{len(method)}} {report.accuracy:6.1%}   {decoding}   trained in {seconds:.0f} s")
    print(f"In {output_dir}: model/, summary.json, reward.png, and trace.html to watch the model answer.")
    return summary


def parse_sft(args: list[str]) -> tuple[DemoArguments, DiffusionSFTConfig]:
    return TrlParser((DemoArguments, DiffusionSFTConfig)).parse_args_and_config(
        ["--config", str(CONFIGS / "sft.yaml"), *args]
    )


def sft_main(args: list[str]) -> None:
    """The first half alone."""
    use_one_thread()
    demo_args, sft_args = parse_sft(args)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, sft_args.seed)
    train_sft(model, tokenizer, demo_args, sft_args)
    heldout = make_problems(demo_args.eval_split, demo_args.eval_problems).remove_columns("completion")
    report = evaluate_accuracy(model, tokenizer, heldout)
    model.save_pretrained(sft_args.output_dir)
    tokenizer.save_pretrained(sft_args.output_dir)
    print(f"Right answers on {report.num_problems} held-out problems: {report.accuracy:.1%}")
    print(f"Model and tokenizer are in {sft_args.output_dir}.")


def settings_of(*names: str) -> list[str]:
    """The demo's settings for an objective, for a value model, as a command line."""
    settings, own = yaml.safe_load((CONFIGS / "objectives.yaml").read_text()), {}
    for name in names:
        own |= {"output_dir": f"runs/demo-{name}", **settings.get(name, {})}
    words = [(f"--{name}", value if isinstance(value, str) else json.dumps(value)) for name, value in own.items()]
    return ["--config", str(CONFIGS / "tracerl.yaml"), *(word for pair in words for word in pair)]


def main(args: list[str]) -> dict:
    """Both halves. The arguments are those of the trainer's config; SFT has the same seed."""
    use_one_thread()
    objective, config_class = find_objective(args)
    value_model = named("value_model", args)
    changed = [objective] if objective != "trace" else [f"value-{value_model}"] if value_model else []
    parser = TrlParser((DemoArguments, config_class))
    demo_args, rl_args = parser.parse_args_and_config([*settings_of(*changed), *args])
    steps = [] if demo_args.sft_steps is None else ["--max_steps", str(demo_args.sft_steps)]
    _, sft_args = parse_sft(["--seed", str(rl_args.seed), "--output_dir", rl_args.output_dir, *steps])
    return run(objective, value_model, demo_args, sft_args, rl_args)
