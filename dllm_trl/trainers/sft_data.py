"""What `DiffusionSFTTrainer` adds to TRL's datasets: columns checked early, and the column `step_map`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl import pack_dataset
from trl.data_utils import get_dataset_column_names

from ..generation.checks import is_conversation
from .constructor_checks import check_dataset


def check_sft_columns(name: str, dataset, text_field: str) -> None:
    """Raises if a dataset (or one of a dict of them) has none of the columns that TRL prepares."""
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_sft_columns(f"{name}[{key!r}]", part, text_field)
        return
    check_dataset(name, dataset)
    columns = get_dataset_column_names(dataset)
    known = ({"input_ids"}, {text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"})
    if not any(needed <= set(columns) for needed in known):
        raise ValueError(
            f"`{name}` has only the columns {list(columns)}. Rename yours to `prompt` and `completion`, `messages` or "
            f"`{text_field}` (`dataset_text_field`), or pass a `formatting_func`."
        )
    if "input_ids" in columns:
        check_tokens(name, dataset)
    elif isinstance(dataset, Dataset):
        read = [c for c in (text_field, "prompt", "completion", "messages", "conversations") if c in columns]
        for index, row in enumerate(dataset.select_columns(read).with_format(None)):
            for column, value in row.items():
                _check_value(
                    f"{name}[{index}]['{column}']", value, only_messages=column in ("messages", "conversations")
                )
            if "prompt" in row and "completion" in row and type(row["prompt"]) is not type(row["completion"]):
                raise ValueError(
                    f"`{name}[{index}]` has text in one of `prompt` and `completion` and messages in the other. Make "
                    "both text, or both messages."
                )


def _check_value(where: str, value: Any, only_messages: bool) -> None:
    if isinstance(value, str) and not only_messages:
        return
    if only_messages and isinstance(value, list):  # published under other names, too, which TRL converts
        names = {"from": "role", "value": "content"}
        value = [{names.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m for m in value]
    if is_conversation(value):
        return
    wanted = "a list of messages, each with `role` and `content`"
    raise ValueError(
        f"`{where}` must be {wanted if only_messages else f'text or {wanted}'}, but is {value!r:.80}. Mend such rows, "
        "or filter them out."
    )


def check_tokens(name: str, dataset, vocab_size: int | None = None) -> None:
    """
    Raises if a map-style dataset (or one of a dict of them) has token ids that are no integers below `vocab_size`, or
    labels or masks of another length; once it is prepared, also if it has nothing to train.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_tokens(f"{name}[{key!r}]", part, vocab_size)
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    # Masks are not read where there are labels, and not cut to `max_length` with them
    masks = ("completion_mask", "assistant_masks")
    per_token = [c for c in (("labels",) if "labels" in dataset.column_names else masks) if c in dataset.column_names]
    trains = "labels" not in per_token
    first = 0
    for table in dataset.select_columns(["input_ids", *per_token]).with_format("arrow").iter(1000):
        ids = table["input_ids"]
        inner = getattr(ids.type, "value_type", None)  # null: of empty lists
        if inner is None or not (pa.types.is_integer(inner) or pa.types.is_null(inner)):
            raise ValueError(f"`{name}['input_ids']` must hold a list of integers per row, but is of type {ids.type}.")
        tokens, lengths = pc.list_flatten(ids), pc.list_value_length(ids)
        least, most = pc.min_max(tokens).as_py().values()
        if least is not None and (least < 0 or vocab_size is not None and most >= vocab_size):
            token = least if least < 0 else most
            index = first + next(i for i, row in enumerate(ids.to_pylist()) if token in row)
            raise ValueError(
                f"`{name}[{index}]['input_ids']` has the token {token}, but the model has tokens from 0 to "
                f"{vocab_size - 1 if vocab_size else 'its vocabulary size - 1'}. Tokenize with the model's own "
                "tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`."
            )
        for column in per_token:
            same = pc.equal(pc.list_value_length(table[column]), lengths)
            if not pc.all(same).as_py():
                index = pc.index(same, False).as_py()
                raise ValueError(
                    f"`{name}[{first + index}]['{column}']` must have one value for each of the "
                    f"{lengths[index].as_py()} tokens of `input_ids`, but is {table[column][index].as_py()!r:.80}."
                )
        # Nothing is generated without a context: the first token of a document is never trained
        trains = trains or any(label != -100 for row in table["labels"].to_pylist() for label in row[1:])
        first += len(table)
    if not trains:
        raise ValueError(
            f"`{name}` has nothing to train: no example has a trained token behind its first one. Is its text empty, "
            "or cut off by `max_length` (`truncation_mode`), `completion_only_loss` or `assistant_only_loss`?"
        )


def check_step_maps(name: str, dataset, objective) -> None:
    """Raises if a dataset (or one of a dict of them) has no step maps."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_step_maps(f"{name}[{key!r}]", part, objective)
    elif dataset is not None and "step_map" not in get_dataset_column_names(dataset):
        raise ValueError(
            f"`{name}` has no column `step_map`, which `objective={objective!r}` trains on: for each token the "
            "denoising step that committed it. `generate_rollouts` records it."
        )


def prepare_step_maps(prepare: Callable, dataset, processing_class, args, packing: bool, formatting_func, name: str):
    """
    TRL's preparation of a dataset with a column `step_map`, which is aligned with the tokens once they are known and
    truncated and packed with them. `prepare` is TRL's method.
    """
    if packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"`packing_strategy={args.packing_strategy!r}` cuts responses into pieces, whose `step_map` would mean "
            "nothing. Use `packing_strategy='bfd'`."
        )
    options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    columns = set(get_dataset_column_names(dataset))
    tokenized = {"input_ids", "completion_mask"} <= columns and "labels" not in columns
    if tokenized and args.completion_only_loss is not False:
        dataset = dataset.map(_label_completion, **options)
    plain = copy.copy(args)
    plain.max_length, plain.shuffle_dataset = None, False
    dataset = prepare(dataset, processing_class, plain, False, formatting_func, name)
    dataset = dataset.map(_align, with_indices=True, fn_kwargs={"name": name}, **options)
    if packing:
        if args.max_length is None:
            raise ValueError("When packing is enabled, `max_length` can't be `None`.")
        dataset = dataset.select_columns(["input_ids", "labels", "step_map"])
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
    elif args.max_length is not None:
        kept = {"start": 0, "stop": args.max_length}
        if args.truncation_mode == "keep_end":
            kept = {"start": -args.max_length, "stop": None}
        dataset = dataset.map(_truncate, fn_kwargs=kept, **options).filter(_trains_something, **options)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _label_completion(row: dict) -> dict:
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return {"labels": [token if trained else -100 for token, trained in pairs]}


def _align(row: dict, index: int, name: str) -> dict:
    """The step map with -1 for the prompt."""
    steps, tokens = row["step_map"], len(row["input_ids"])
    prompt = next((i for i, label in enumerate(row["labels"]) if label != -100), tokens)
    if len(steps) == tokens:
        return {"step_map": steps}
    if len(steps) != tokens - prompt:
        raise ValueError(
            f"Row {index} of the {name} dataset: `step_map` has {len(steps)} entries, but the row has "
            f"{tokens - prompt} completion tokens ({tokens} with the prompt). Text that is tokenized again need not "
            "give the tokens of the rollout, and templates and EOS add to it. Store token ids: `input_ids`, "
            "`completion_mask` and `step_map` of equal length."
        )
    return {"step_map": [-1] * prompt + steps}


def _truncate(row: dict, start: int, stop: int | None) -> dict:
    aligned = ("input_ids", "labels", "step_map", "completion_mask", "assistant_masks")
    return {name: row[name][start:stop] for name in aligned if name in row}


def _trains_something(row: dict) -> bool:
    return any(label != -100 and step >= 0 for label, step in zip(row["labels"], row["step_map"], strict=True))


@dataclass
class StepMapCollator:
    """A collator's batch, with `step_map` of the shape of `input_ids` if the rows have one, -1 for padding."""

    collator: Callable[[list[dict]], dict[str, Any]]
    required: bool = True

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        if "step_map" not in examples[0]:
            if self.required:
                raise ValueError("The dataset has no column `step_map`, which the objective trains on.")
            return self.collator(examples)
        step_maps = [torch.as_tensor(example["step_map"], dtype=torch.long) for example in examples]
        batch = self.collator([{k: v for k, v in row.items() if k != "step_map"} for row in examples])
        for row, steps in zip(examples, step_maps, strict=True):
            if len(steps) != len(row["input_ids"]):
                raise ValueError(
                    f"`step_map` has {len(steps)} entries for {len(row['input_ids'])} `input_ids`. With "
                    "`skip_prepare_dataset` they must be of equal length, -1 for the prompt."
                )
        steps = torch.cat(step_maps)
        batch["step_map"] = torch.full_like(batch["input_ids"], -1)
        mask = batch.get("attention_mask")
        if mask is not None:
            batch["step_map"][mask.bool()] = steps
        else:  # one flat row; what a multiple adds lies behind it
            batch["step_map"][0, : len(steps)] = steps
        return batch


@dataclass
class SampleLengthsCollator:
    """A flat batch, of `padding_free` or packing, with `sample_lengths`: how many of its tokens each sample has."""

    collator: Callable[[list[dict]], dict[str, Any]]

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {**self.collator(examples), "sample_lengths": lengths}
