import json
from pathlib import Path

import pytest
from _data import (
    INSTRUCTION,
    drop_long_prompts,
    load_table,
    load_tokenizer,
    make_parser,
    names_nothing,
    open_answers,
    resume_point,
    to_examples,
    to_prompts,
)
from _word_problems import make_problems, make_tokenizer
from datasets import Dataset

from dllm_trl import TraceRLConfig


PROBLEM = "Let $x = \\frac{1}{2}$.\n  What is “2x” — exactly?  "  # spaces and signs must survive


@pytest.mark.parametrize("column", ["problem", "question"])
@pytest.mark.parametrize(
    "answers", [{"answer": ["\\frac{1}{2}"]}, {"answer": [18]}, {"solution": ["So $1$.\n\n#### 1"]}]
)
def test_problems_become_user_messages_and_nothing_is_lost(column, answers):
    dataset = to_prompts(Dataset.from_dict({column: [PROBLEM], **answers, "level": [5]}))
    assert dataset[0]["prompt"] == [{"role": "user", "content": PROBLEM + INSTRUCTION}]
    for name, values in answers.items():
        assert dataset[name][:] == values
    assert dataset["level"][:] == [5]


@pytest.mark.parametrize(
    "prompt", ["1+1=", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]]
)
def test_a_prompt_stays_as_it_is(prompt):
    dataset = Dataset.from_dict({"prompt": [prompt], "answer": ["2"]})
    assert to_prompts(dataset)[0] == {"prompt": prompt, "answer": "2"}


def test_instruction_can_be_changed():
    dataset = Dataset.from_dict({"problem": ["1+1?"], "answer": ["2"]})
    assert to_prompts(dataset, instruction="")[0]["prompt"][0]["content"] == "1+1?"


@pytest.mark.parametrize(
    ("columns", "missing"), [({"text": ["1+1"], "answer": ["2"]}, "problem"), ({"text": ["1+1"]}, "problem")]
)
def test_missing_columns_are_named(columns, missing):
    with pytest.raises(
        ValueError,
        match=rf"columns {sorted(columns, reverse=True)}.*{missing}.*[Rr]ename".replace("[", r"\[", 1).replace(
            "]", r"\]", 1
        ),
    ):
        to_prompts(Dataset.from_dict(dict(sorted(columns.items(), reverse=True))))


def test_solutions_become_completions():
    dataset = Dataset.from_dict({"problem": ["1+1?"], "solution": ["It is \\boxed{2}."], "answer": ["2"]})
    row = to_examples(dataset)[0]
    assert row["completion"] == [{"role": "assistant", "content": "It is \\boxed{2}."}]
    assert row["prompt"][0]["content"] == "1+1?" + INSTRUCTION
    assert to_examples(Dataset.from_dict({"question": ["1+1?"], "answer": [2]}))[0]["completion"][0]["content"] == "2"
    messages = Dataset.from_dict({"messages": [[{"role": "user", "content": "?"}]], "source": ["x"]})
    assert to_examples(messages).column_names == ["messages"]
    with pytest.raises(ValueError, match="hold what to learn"):
        to_examples(Dataset.from_dict({"problem": ["1+1?"]}))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files(tmp_path, suffix):
    rows = [{"problem": PROBLEM, "answer": "1"}, {"problem": "2+2?", "answer": "4"}]
    path = tmp_path / f"problems{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    assert load_table(str(path), None, "train").to_list() == rows
    with pytest.raises(FileNotFoundError, match="dataset_name"):
        load_table(str(tmp_path / f"no{suffix}"), None, "train")


def test_long_prompts_are_left_out_not_cut(capsys):
    tokenizer, problems = make_tokenizer(), make_problems("validation", 50)
    lengths = [
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        for prompt in problems["prompt"]
    ]
    limit = sorted(lengths)[25]
    kept = drop_long_prompts(problems, tokenizer, limit)
    assert kept.to_list() == [row for row, length in zip(problems, lengths) if length <= limit]
    assert f"{50 - len(kept)} of 50 problems left out" in capsys.readouterr().out
    assert drop_long_prompts(problems, tokenizer, None) is problems
    with pytest.raises(ValueError, match="max_prompt_length=3"):
        drop_long_prompts(problems, tokenizer, 3)


def test_default_is_asked_for_by_naming_nothing():
    assert names_nothing([]) and names_nothing(["--seed", "1", "--output_dir", "x"])
    assert not names_nothing(["--dataset_name=x.json"])
    assert not names_nothing(["--config", "x.yaml"])
    assert not names_nothing(["--help"])


def test_one_name_alone_is_an_error(tmp_path):
    import tracerl_math

    parsed = make_parser(TraceRLConfig).parse_args_and_config(
        ["--dataset_name", "x.json", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    )
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        tracerl_math.main(*parsed)


THINK = "<|im_start|>assistant<think>\n"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_instruction_around_the_problem():
    dataset = Dataset.from_dict({"problem": ["Is {problem} a name?"], "answer": ["2"]})
    prompt = to_prompts(dataset, instruction="Answer in \\boxed{}:\n{problem}\nNow.")[0]["prompt"]
    assert prompt[0]["content"] == "Answer in \\boxed{}:\nIs {problem} a name?\nNow."


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("True", True),
        ("true", True),
        (True, True),
        ("False", False),
        ("None", None),
        (None, None),
        ("runs/x", "runs/x"),
    ],
)
def test_resume_from_the_last_checkpoint(given, meant):
    assert resume_point(given) == meant


def test_programs_have_tests_instead_of_answers():
    columns = {"test_input": [["1\n"]], "test_output": [["2\n"]], "test_method": ["stdio"]}
    row = to_prompts(Dataset.from_dict({"question": ["Add one."], **columns}))[0]
    assert row["prompt"][0]["content"] == "Add one." + INSTRUCTION
    assert {name: [row[name]] for name in columns} == columns
    assert to_prompts(Dataset.from_dict({"question": ["?"], "ground_truth_answer": ["7"]}))[0]["answer"] == "7"


@pytest.mark.parametrize("prompt", ["Write f.", [{"role": "user", "content": "Write f."}]])
def test_prompts_with_solutions(prompt):
    row = to_examples(Dataset.from_dict({"prompt": [prompt], "solution": ["def f(): pass"]}))[0]
    assert row["prompt"] == prompt
    assert row["completion"] == (
        "def f(): pass" if isinstance(prompt, str) else [{"role": "assistant", "content": "def f(): pass"}]
    )


def test_a_thinking_model_starts_to_think():
    """The prompt ends as TraDo-8B-Thinking's does, whatever the template says, and keeps the other columns."""
    problems = to_prompts(Dataset.from_dict({"problem": ["1+1?"], "answer": ["2"]}), instruction=" Box it.")
    row = open_answers(problems, chatml_tokenizer(), THINK)[0]
    assert row == {"answer": "2", "prompt": "<|im_start|>user\n1+1? Box it.<|im_end|>\n" + THINK}
    assert open_answers(problems, chatml_tokenizer(), None) is problems
    text = Dataset.from_dict({"prompt": ["1+1="], "answer": ["2"]})
    assert open_answers(text, chatml_tokenizer(), THINK) is text


@pytest.mark.parametrize("answer", ["<think>\nTwo.\n</think>\n2", "Two.\n</think>\n2"])
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_a_thinking_model_goes_on_from_there(answer, column):
    """Where the answer begins with the end of the prompt, that is not said twice."""
    user, assistant = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": answer}
    rows = {"messages": [[user, assistant]]} if column == "messages" else {"prompt": [[user]], column: [[assistant]]}
    row = open_answers(to_examples(Dataset.from_dict(rows)), chatml_tokenizer(), THINK)[0]
    assert row == {
        "prompt": "<|im_start|>user\n1+1?<|im_end|>\n" + THINK,
        "completion": "Two.\n</think>\n2",
    }


def test_long_prompts_of_messages_are_left_out():
    def conversation(text):
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "long " * 50}]

    dataset = Dataset.from_dict({"messages": [conversation("Leo"), conversation("Leo " * 30)]})
    assert drop_long_prompts(dataset, make_tokenizer(), 10).to_list() == dataset.to_list()[:1]


def test_template_of_mmada(tmp_path):
    """The numbers of characters and line breaks are those of the public code's template."""
    make_tokenizer().save_pretrained(tmp_path)
    path = Path(__file__).parents[2] / "recipes" / "templates" / "mmada.jinja"
    tokenizer = load_tokenizer(str(tmp_path), None, str(path))
    tokenizer.bos_token = "<bos>"
    messages = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "Ho"}]
    start, end = "<|start_header_id|>", "<|end_header_id|>\n"
    text = f"<bos>{start}user{end}Hi<|eot_id|>"
    done = tokenizer.apply_chat_template(messages, tokenize=False)
    assert done == f"{text}{start}assistant{end}Ho<|eot_id|>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{text}{start}assistant{end}"
    assert load_tokenizer(str(tmp_path), None, None).chat_template == make_tokenizer().chat_template
