"""One SFT run in a process of its own: `run_sft.py options.json`. Several processes with `torchrun`."""

import json
import os
import sys

from datasets import Dataset
from peft import LoraConfig
from sharded_on_cpu import shard_on_cpu
from tiny_rl import make_model, make_tokenizer

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.trainers.processes import end_processes


def main(options: dict) -> None:
    rows, family = options.pop("rows"), options.pop("family", "sdar")
    resume, sharded, lora, model = (options.pop(name, None) for name in ("resume", "sharded", "lora", "model"))
    if sharded:
        shard_on_cpu()
    data = {
        "prompt": [f"{i}+1=" for i in range(rows)],
        "completion": [f"{i + 1}" + "!" * (i % 5) for i in range(rows)],
    }
    if options.get("objective") == "trace":  # as many rounds as a completion has tokens: different ones per process
        data["step_map"] = [list(range(len(completion) + 1)) for completion in data["completion"]]
    trainer = DiffusionSFTTrainer(
        model=model or make_model(family),
        args=DiffusionSFTConfig(report_to="none", use_cpu=not sharded, bf16=False, logging_steps=1, **options),
        train_dataset=Dataset.from_dict(data),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(os.path.join(trainer.args.output_dir, "state.json"))
    end_processes(trainer.accelerator)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
