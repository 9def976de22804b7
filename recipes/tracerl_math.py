"""
Reinforcement learning on math problems with answers: TraceRL, or what `--objective` names.

A published model, with the paper's settings:

    accelerate launch recipes/tracerl_math.py --config recipes/configs/trado-4b/math.yaml

On other problems, from the Hub or a file (`--help` lists all arguments):

    accelerate launch recipes/tracerl_math.py --config recipes/configs/trado-4b/math.yaml --dataset_name problems.jsonl

With no model and no dataset, a tiny model is made, fine-tuned and trained on word problems (`make demo`):

    python recipes/tracerl_math.py
    python recipes/tracerl_math.py --objective coupled
"""

import sys

from _data import DataArguments, make_parser, names_nothing, to_prompts
from _main import train
from _objectives import find_objective, parse, trainer_of
from _rewards import check_answers, find_rewards
from datasets import Dataset
from trl import ModelConfig

from dllm_trl import DiffusionGRPOConfig


def main(data_args: DataArguments, training_args: DiffusionGRPOConfig, model_args: ModelConfig) -> None:
    reward_funcs = find_rewards(data_args.reward_funcs)

    def prepare(dataset: Dataset) -> Dataset:
        dataset = to_prompts(dataset, data_args.instruction)
        check_answers(reward_funcs, dataset)
        return dataset

    train(trainer_of(training_args), prepare, data_args, training_args, model_args, reward_funcs=reward_funcs)


if __name__ == "__main__":
    if names_nothing(sys.argv[1:]):
        import _demo

        _demo.main(sys.argv[1:])
    else:
        _, config_class = find_objective(sys.argv[1:])
        main(*parse(make_parser(config_class), sys.argv[1:]))
