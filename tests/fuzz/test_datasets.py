import pytest
from datasets import Dataset

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer, TraceRLConfig, TraceRLTrainer

from ..trainers.tiny_rl import ON_CPU, letter_reward, make_model, make_prompts, make_tokenizer
from .doors import judge


pytestmark = pytest.mark.slow
EXAMPLES = Dataset.from_dict({"prompt": ["ab"] * 8, "completion": ["cd"] * 8})


def without(name):
    tokenizer = make_tokenizer()
    setattr(tokenizer, name, None)
    return tokenizer


def larger():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(100)] + ["ab"])
    return tokenizer


def train(kind, path, **bad):
    """A step of a trainer, one of whose arguments is bad."""
    small = {"output_dir": str(path), "max_steps": 1, "per_device_train_batch_size": 8, "disable_tqdm": True, **ON_CPU}
    if kind == "rl":
        trainer_class, data = TraceRLTrainer, make_prompts()
        args = TraceRLConfig(num_generations=4, max_completion_length=6, **small)
        bad = {"reward_funcs": letter_reward, **bad}
    else:
        trainer_class, data = DiffusionSFTTrainer, EXAMPLES
        args = DiffusionSFTConfig(**small)
    bad = {"model": make_model(), "args": args, "train_dataset": data, "processing_class": make_tokenizer(), **bad}
    trainer_class(**bad).train()


def test_rl(tmp_path):
    def table(column, values, words="prompt"):
        return [
            ((words,), value, lambda v=value: train("rl", tmp_path, train_dataset=Dataset.from_dict({column: v})))
            for value in values
        ]

    def rewards(completions, **kwargs):
        return [1.0] * (len(completions) + 1)

    def words(completions, **kwargs):
        return ["good"] * len(completions)

    def raises(completions, **kwargs):
        raise KeyError("gold")

    rows = table("text", [["ab"] * 8, [1] * 8]) + table("prompt", [[""] * 8, ["ab"] * 7 + [""], [None] * 8])
    rows += table(
        "prompt",
        [
            [1] * 8, [[]] * 8, ["ab" * 500] * 8, [["ab"]] * 8, [[{"role": "user"}]] * 8, [[{"content": "ab"}]] * 8,
            [["ab", "cd"]] * 8, [[7, 8]] * 8, [{"role": "user", "content": "ab"}] * 8,
            [[{"role": "user", "content": None}]] * 8, [[{"role": "user", "content": 3}]] * 8,
            [[{"role": "user", "content": "a"}]] * 7 + [[]], [1.5] * 8,
        ],
    )  # fmt: skip
    rows += [
        (("reward",), name, lambda f=function: train("rl", tmp_path, reward_funcs=f))
        for name, function in (("more", rewards), ("words", words), ("raises", raises), ("none", None), ("number", 3))
    ]
    rows += [
        (("mask",), "no mask token", lambda: train("rl", tmp_path, processing_class=without("mask_token"),
                                                   model=make_model(mask_token_id=None))),
        (("train_dataset",), "none", lambda: train("rl", tmp_path, train_dataset=None)),
        (("train_dataset",), "list", lambda: train("rl", tmp_path, train_dataset=[{"prompt": "ab"}])),
        (("train_dataset",), "empty", lambda: train("rl", tmp_path, train_dataset=Dataset.from_dict({"prompt": []}))),
        (("eval_dataset",), "list", lambda: train("rl", tmp_path, eval_dataset=[{"prompt": "ab"}])),
        (("args",), "sft", lambda: train("rl", tmp_path, args=DiffusionSFTConfig(str(tmp_path), **ON_CPU))),
    ]  # fmt: skip
    judge("TraceRLTrainer", rows)


def test_other_names_of_messages_work(tmp_path):
    turns = [[{"from": "user", "value": "ab"}, {"from": "assistant", "value": "cd"}]] * 8
    train("sft", tmp_path, train_dataset=Dataset.from_dict({"conversations": turns}))


def test_an_empty_answer_is_an_answer(tmp_path):
    train("sft", tmp_path, train_dataset=Dataset.from_dict({"prompt": ["ab"] * 8, "completion": [""] * 8}))


def test_sft(tmp_path):
    message = {"role": "user", "content": "ab"}
    one_bad = [["ab"], ["ab"], ["ab"], ["ab"], ["ab"], ["ab"], ["ab"]]
    tables = [
        ("text", {"text": [""] * 8}),  # EOS alone: there is nothing to condition on
        ("text", {"text": [None] * 8}),
        ("text", {"text": ["ab"] * 7 + [None]}),
        ("text", {"text": [1] * 8}),
        ("text", {"text": [["ab"]] * 8}),
        ("train_dataset", {"other": ["ab"] * 8}),
        ("train_dataset", {"prompt": ["ab"] * 8}),
        ("train_dataset", {"completion": ["ab"] * 8}),
        ("completion", {"prompt": ["ab"] * 8, "completion": [None] * 8}),
        ("completion", {"prompt": ["ab"] * 8, "completion": ["ab"] * 7 + [None]}),
        ("completion", {"prompt": ["ab"] * 8, "completion": [1] * 8}),
        ("completion", {"prompt": [[message]] * 8, "completion": [[]] * 8}),
        ("prompt", {"prompt": [None] * 8, "completion": ["ab"] * 8}),
        ("prompt", {"prompt": [2.5] * 8, "completion": ["ab"] * 8}),
        ("prompt", {"prompt": [[]] * 8, "completion": [[message]] * 8}),
        ("prompt", {"prompt": [["ab"]] * 8, "completion": ["ab"] * 8}),
        ("completion", {"prompt": [[message]] * 8, "completion": ["ab"] * 8}),
        ("completion", {"prompt": ["ab"] * 8, "completion": [[message]] * 8}),
        ("conversations", {"conversations": [[]] * 8}),
        ("conversations", {"conversations": ["ab"] * 8}),
        ("conversations", {"conversations": [[{"from": "user"}]] * 8}),
        ("messages", {"messages": [[{"role": "user", "content": 3}]] * 8}),
        ("messages", {"messages": [[]] * 8}),
        ("messages", {"messages": [[message]] * 7 + [[]]}),
        ("messages", {"messages": [None] * 8}),
        ("messages", {"messages": ["ab"] * 8}),
        ("messages", {"messages": one_bad}),
        ("messages", {"messages": [[{"role": "user"}]] * 8}),
        ("messages", {"messages": [[{"content": "ab"}]] * 8}),
        ("messages", {"messages": [[message, {"role": "assistant", "content": None}]] * 8}),
        ("messages", {"messages": [message] * 8}),
        ("train", {"input_ids": [[]] * 8}),
        ("train", {"input_ids": [[7]] * 8}),
        ("input_ids", {"input_ids": [None] * 8}),
        ("input_ids", {"input_ids": [7] * 8}),
        ("input_ids", {"input_ids": [[[7, 8]]] * 8}),
        ("input_ids", {"input_ids": [[10**6, 7]] * 8}),
        ("input_ids", {"input_ids": [[8, 7]] * 7 + [[54, 7]]}),
        ("input_ids", {"input_ids": [[-1, 7]] * 8}),
        ("input_ids", {"input_ids": [[1.5, 7.0]] * 8}),
        ("input_ids", {"input_ids": [["a", "b"]] * 8}),
        ("input_ids", {"input_ids": ["ab"] * 8}),
        ("completion_mask", {"input_ids": [[7, 8, 9]] * 8, "completion_mask": [[1]] * 8}),
        ("completion_mask", {"input_ids": [[7, 8, 9]] * 8, "completion_mask": [[0, 1, 1, 1]] * 8}),
        ("labels", {"input_ids": [[7, 8, 9]] * 8, "labels": [[7, 8]] * 8}),
        ("train", {"input_ids": [[7, 8, 9]] * 8, "labels": [[-100] * 3] * 8}),
        ("labels", {"input_ids": [[7, 8, 9]] * 8, "labels": [[8, 9, 7]] * 8}),
        ("train_dataset", {}),
        ("train_dataset", {"text": []}),
    ]
    rows = [
        ((word,), value, lambda v=value: train("sft", tmp_path, train_dataset=Dataset.from_dict(v)))
        for word, value in tables
    ]
    rows += [
        (("args",), "rl", lambda: train("sft", tmp_path, args=TraceRLConfig(str(tmp_path), **ON_CPU))),
        (("args",), "dict", lambda: train("sft", tmp_path, args={"max_steps": 1})),
        (("EOS",), "no EOS", lambda: train("sft", tmp_path, processing_class=without("eos_token"))),
        (("input_ids", "resize"), "larger tokenizer", lambda: train("sft", tmp_path, processing_class=larger())),
        (("train_dataset",), "none", lambda: train("sft", tmp_path, train_dataset=None)),
        (("train_dataset",), "list", lambda: train("sft", tmp_path, train_dataset=[{"text": "ab"}])),
    ]
    judge("DiffusionSFTTrainer", rows)
