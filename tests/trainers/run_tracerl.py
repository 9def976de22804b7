"""One TraceRL run in a process of its own: `run_tracerl.py options.json`. Several processes with `torchrun`."""

import json
import os
import signal
import sys

from peft import LoraConfig
from sharded_on_cpu import shard_on_cpu
from tiny_rl import chunk_reward, letter_reward, make_model, make_prompts, make_tokenizer
from transformers import TrainerCallback

from dllm_trl.trainers import TraceRLConfig, TraceRLTrainer
from dllm_trl.trainers.processes import end_processes


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does, at the end of an optimizer step and before its checkpoint is written."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_value_training(estimator, update: int) -> None:
    """Ends the process in the middle of the critic's `update`-th update: its weights are new, its optimizer's not."""
    updates = iter(range(1, update + 1))

    def count(*args):
        if next(updates) == update:
            os.kill(os.getpid(), signal.SIGKILL)

    estimator.optimizer.register_step_post_hook(count)


def main(options: dict) -> None:
    names = ("resume", "kill_at", "rows", "eval_rows", "family", "sharded", "lora", "model", "chunk_rewards")
    kill_in_update = options.pop("kill_in_update", None)
    resume, kill_at, rows, eval_rows, family, sharded, lora, model, chunks = (options.pop(n, None) for n in names)
    if sharded:
        shard_on_cpu()
    args = TraceRLConfig(report_to="none", use_cpu=not sharded, bf16=False, logging_steps=1, **options)
    trainer = TraceRLTrainer(
        model=model or make_model(family or "sdar"),
        reward_funcs=[letter_reward, chunk_reward] if chunks else letter_reward,
        args=args,
        train_dataset=make_prompts(rows),
        eval_dataset=make_prompts(eval_rows) if eval_rows else None,
        processing_class=make_tokenizer(),
        callbacks=[Kill(kill_at)] if kill_at else None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
    )
    if kill_in_update:
        kill_in_value_training(trainer.estimator, kill_in_update)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(os.path.join(args.output_dir, "state.json"))
    end_processes(trainer.accelerator)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
