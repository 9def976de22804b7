"""What the recipes do alike: from the parsed arguments to the trained model."""

from collections.abc import Callable

from _data import DataArguments, check_names, drop_long_prompts, load_table, load_tokenizer, open_answers, resume_point
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from dllm_trl.trainers.processes import end_processes


def train(
    trainer_class: type[Trainer],
    prepare: Callable[[Dataset], Dataset],
    data_args: DataArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    **more,
) -> None:
    """Trains and saves. `prepare` makes the columns of the trainer, which is given `more`, out of a dataset's own."""
    check_names(data_args, model_args.model_name_or_path)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, data_args.chat_template)

    def load(split: str) -> Dataset:
        dataset = prepare(load_table(data_args.dataset_name, data_args.dataset_config, split))
        dataset = open_answers(dataset, tokenizer, data_args.generation_prompt)
        return drop_long_prompts(dataset, tokenizer, data_args.max_prompt_length)

    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load(data_args.dataset_train_split),
        eval_dataset=load(data_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **more,
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    end_processes(trainer.accelerator)
