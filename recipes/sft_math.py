"""
SFT on math problems with solutions, and on programming problems just the same.

    accelerate launch recipes/sft_math.py --config recipes/configs/sdar-4b/math_sft.yaml
    accelerate launch recipes/sft_math.py --config recipes/configs/dream-7b/code_sft.yaml

On other problems, from the Hub or a file (`--help` lists all arguments):

    accelerate launch recipes/sft_math.py --config recipes/configs/sdar-4b/math_sft.yaml --dataset_name solved.jsonl

With no model and no dataset, a tiny model is made and fine-tuned on word problems, and saved in runs/sft/:

    python recipes/sft_math.py
"""

import sys

from _data import DataArguments, make_parser, names_nothing, to_examples
from _main import train
from datasets import Dataset
from trl import ModelConfig

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer


def main(data_args: DataArguments, training_args: DiffusionSFTConfig, model_args: ModelConfig) -> None:
    def prepare(dataset: Dataset) -> Dataset:
        return to_examples(dataset, data_args.instruction)

    train(DiffusionSFTTrainer, prepare, data_args, training_args, model_args)


if __name__ == "__main__":
    if names_nothing(sys.argv[1:]):
        import _demo

        _demo.sft_main(sys.argv[1:])
    else:
        main(*make_parser(DiffusionSFTConfig).parse_args_and_config())
