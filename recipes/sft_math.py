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
    to_examples,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.trainers.processes import end_processes


def main(data_args: DataArguments, training_args: DiffusionSFTConfig, model_args: ModelConfig) -> None:
    check_names(data_args, model_args.model_name_or_path)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, data_args.chat_template)

    def load(split: str):
        dataset = load_table(data_args.dataset_name, data_args.dataset_config, split)
        dataset = to_examples(dataset, data_args.instruction)
        dataset = open_answers(dataset, tokenizer, data_args.generation_prompt)
        return drop_long_prompts(dataset, tokenizer, data_args.max_prompt_length)

    trainer = DiffusionSFTTrainer(
        model=model_args.model_name_or_path,
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

        _demo.sft_main(sys.argv[1:])
    else:
        main(*make_parser(DiffusionSFTConfig).parse_args_and_config())
