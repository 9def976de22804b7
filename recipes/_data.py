"""Problems from the Hub or from a file, in the columns that the trainers expect."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser


INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class DataArguments:
    """What the recipes take beside the trainer's and the model's arguments."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of a dataset on the Hub, or path of a JSON or JSONL file. Columns: `problem` or `question`, "
            "or `prompt` as TRL defines it, with what the rewards ask for (SFT: `solution` or `answer`)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if `eval_strategy` is not 'no'."}
    )
    instruction: str = field(
        default=INSTRUCTION,
        metadata={
            "help": "Appended to each `problem` or `question`; put around it if it holds '{problem}'. A `prompt` "
            "stays as it is."
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file with a chat template, in place of the tokenizer's own."}
    )
    generation_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What prompts of messages end in, in place of the chat template's own beginning of an answer. For "
            "models that are to think first, such as '<|im_start|>assistant<think>\n'."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Problems with longer prompts, in tokens, are left out (never cut)."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={
            "help": "TraceRL only: 'math' (is the answer right?), 'format' (is there one box?), the dotted path of a "
            "function of your own such as 'my_module.my_reward' (also from the folder you are in), or a reward model: "
            "its name on the Hub or its folder."
        },
    )


def names_nothing(args: list[str]) -> bool:
    """Whether a command line asks for the embedded default: neither a config nor a dataset nor a model."""
    named = {"--config", "--dataset_name", "--model_name_or_path", "-h", "--help"}
    return not any(arg.split("=")[0] in named for arg in args)


def make_parser(config_class: type) -> TrlParser:
    """Parser of a recipe's command line. TRL's default of bfloat16 needs an accelerator."""
    parser = TrlParser((DataArguments, config_class, ModelConfig))
    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)
    return parser


def resume_point(value: str | bool | None) -> str | bool | None:
    """What `train` is to resume from: a folder, or with "True" the last checkpoint of the run."""
    words = {"true": True, "false": False, "none": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def check_names(data_args: DataArguments, model_name: str | None) -> None:
    """Raises unless both a dataset and a model are named."""
    for name, value in (("dataset_name", data_args.dataset_name), ("model_name_or_path", model_name)):
        if value is None:
            raise ValueError(
                f"`{name}` is not set. Give it, or neither a model nor a dataset for the embedded default."
            )


def load_tokenizer(name: str, revision: str | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; with a chat template of its own or the one in that file."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text().strip()
    return tokenizer


def load_table(name: str, config: str | None, split: str) -> Dataset:
    """A JSON or JSONL file, or a split of a dataset on the Hub."""
    if not name.endswith((".json", ".jsonl")):
        return load_dataset(name, config, split=split)
    if not Path(name).is_file():
        raise FileNotFoundError(f"`dataset_name={name}` is no file. Give the path of a JSON or JSONL file.")
    return load_dataset("json", data_files=name, split="train")


def _first(candidates: tuple[str, ...], columns: list[str], purpose: str) -> str:
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(
        f"The dataset has the columns {columns}, but none of {list(candidates)}, which {purpose}. Rename yours."
    )


def _ask(problem: str, instruction: str) -> list[dict[str, str]]:
    """The user's message."""
    text = instruction.replace("{problem}", problem) if "{problem}" in instruction else problem + instruction
    return [{"role": "user", "content": text}]


def to_prompts(dataset: Dataset, instruction: str = INSTRUCTION) -> Dataset:
    """
    For reinforcement learning: a `problem` or `question` becomes a `prompt`, a user message with the instruction.
    Everything else stays as it is: what it has to hold is for the rewards to say.
    """
    if "ground_truth_answer" in dataset.column_names and "answer" not in dataset.column_names:
        dataset = dataset.rename_column("ground_truth_answer", "answer")  # as the data of dLLM-RL calls it
    columns = dataset.column_names
    name = _first(("prompt", "problem", "question"), columns, "hold the problems")
    if name == "prompt":
        return dataset
    return dataset.map(lambda row: {"prompt": _ask(row[name], instruction)}, remove_columns=name)


def to_examples(dataset: Dataset, instruction: str = INSTRUCTION) -> Dataset:
    """
    For fine-tuning: `prompt` and `completion`. Datasets in one of TRL's formats stay as they are; else a worked
    `solution` (or an `answer`, where that is all there is) becomes the assistant's message.
    """
    columns = dataset.column_names
    if "messages" in columns:
        return dataset.select_columns("messages")
    if {"prompt", "completion"} <= set(columns):
        return dataset.select_columns(["prompt", "completion"])
    name = _first(
        ("problem", "question", "prompt"),
        columns,
        "hold the problems (or `messages`, or `prompt` and `completion`)",
    )
    target = _first(("solution", "answer"), columns, "hold what to learn")

    def example(row):
        prompt = row[name] if name == "prompt" else _ask(row[name], instruction)
        solution = str(row[target])
        return {
            "prompt": prompt,
            "completion": solution if isinstance(prompt, str) else [{"role": "assistant", "content": solution}],
        }

    return dataset.map(example, remove_columns=columns)


def _without_overlap(prompt: str, answer: str) -> str:
    """The answer without the beginning that the prompt ends in already, such as `<think>`."""
    overlap = next((size for size in range(len(prompt), 0, -1) if answer.startswith(prompt[-size:])), 0)
    return answer[overlap:]


def open_answers(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, generation_prompt: str | None) -> Dataset:
    """
    Writes prompts of messages out as text that ends in `generation_prompt`, and completions as text that goes on from
    there. Everything stays as it is if that is `None`, or if the dataset holds text.
    """
    first = "messages" if "messages" in dataset.column_names else "prompt"
    if generation_prompt is None or isinstance(dataset[0][first], str):
        return dataset

    def write_out(row):
        messages, answer = row[first], None
        if first == "messages":
            *messages, answer = messages
        elif "completion" in row:
            (answer,) = row["completion"]
        text = {"prompt": tokenizer.apply_chat_template(messages, tokenize=False) + generation_prompt}
        if answer is not None:
            text["completion"] = _without_overlap(generation_prompt, answer["content"])
        return text

    return dataset.map(write_out, remove_columns=["messages"] if first == "messages" else None)


def drop_long_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Leaves out the problems whose prompts have more than `max_length` tokens."""
    if max_length is None:
        return dataset

    def fits(row) -> bool:
        prompt = row["prompt"] if "prompt" in row else row["messages"][:-1]
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"]) <= max_length
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) <= max_length

    kept = dataset.filter(fits, desc="Measuring prompts")
    if len(kept) == 0:
        raise ValueError(f"All prompts are longer than `max_prompt_length={max_length}`. Raise it.")
    if len(kept) < len(dataset):
        print(f"{len(dataset) - len(kept)} of {len(dataset)} problems left out: prompts over {max_length} tokens.")
    return kept
