"""
TraceRL on math problems with answers.

A published model, with the paper's settings:

    accelerate launch recipes/tracerl_math.py --config recipes/configs/trado-4b/math.yaml

On other problems, from the Hub or a file (`--help` lists all arguments):

    accelerate launch recipes/tracerl_math.py --config recipes/configs/trado-4b/math.yaml --dataset_name problems.jsonl

With no model and no dataset, a tiny model is made, fine-tuned and trained on word problems (`make demo`):

    python recipes/tracerl_math.py
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from _data import (
    DataArguments,
    check_names,
    drop_long_prompts,
    load_table,
    load_tokenizer,
    make_parser,
    names_nothing,
    open_answers,
    resume_point,
    to_prompts,
)
from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from dllm_trl import TraceRLConfig, TraceRLTrainer
from dllm_trl.rewards import format_reward, math_reward
from dllm_trl.trainers.processes import end_processes


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


def main(data_args: DataArguments, training_args: TraceRLConfig, model_args: ModelConfig) -> None:
    check_names(data_args, model_args.model_name_or_path)
    reward_funcs = find_rewards(data_args.reward_funcs)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, data_args.chat_template)

    def load(split: str):
        dataset = load_table(data_args.dataset_name, data_args.dataset_config, split)
        dataset = to_prompts(dataset, data_args.instruction)
        check_answers(reward_funcs, dataset)
        dataset = open_answers(dataset, tokenizer, data_args.generation_prompt)
        return drop_long_prompts(dataset, tokenizer, data_args.max_prompt_length)

    trainer = TraceRLTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=load(data_args.dataset_train_split),
        eval_dataset=load(data_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    end_processes(trainer.accelerator)


if __name__ == "__main__":
    if names_nothing(sys.argv[1:]):
        import _demo

        _demo.main(sys.argv[1:])
    else:
        main(*make_parser(TraceRLConfig).parse_args_and_config())
