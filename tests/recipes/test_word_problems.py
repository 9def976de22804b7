import re

import pytest
from _word_problems import STORIES, make_model, make_problems, make_tokenizer, work_out

from dllm_trl.rewards import math_reward


def texts(dataset) -> list[str]:
    return [messages[0]["content"] for messages in dataset["prompt"]]


def numbers_and_result(story: str) -> int:
    """Reads a story independently of the code that made it: the words that only one operation has."""
    a, b = map(int, re.findall(r"\d+", story))
    subtracts = re.search(r"left|gave|How many more", story) is not None
    return a - b if subtracts else a + b


@pytest.mark.parametrize("seed", [0, 1])
def test_training_has_no_text_of_another_split(seed):
    heldout, validation = texts(make_problems("heldout")), texts(make_problems("validation"))
    train = texts(make_problems("train", 8000, seed=seed))
    assert len(heldout) == len(set(heldout)) >= 500
    assert not set(heldout) & set(validation)
    assert not (set(heldout) | set(validation)) & set(train)


def test_splits_do_not_depend_on_size_or_carelessness():
    assert texts(make_problems("heldout", 20, careless=1.0)) == texts(make_problems("heldout"))[:20]
    assert texts(make_problems("train", 50, careless=1.0)) == texts(make_problems("train", 100))[:50]
    assert texts(make_problems("train", 50, seed=1)) != texts(make_problems("train", 50, seed=2))


@pytest.mark.parametrize("split", ["heldout", "train"])
def test_answers_are_right(split):
    problems = make_problems(split, 600)
    assert [int(answer) for answer in problems["answer"]] == [numbers_and_result(text) for text in texts(problems)]
    assert math_reward(completions=problems["completion"], answer=problems["answer"]) == [1.0] * 600


def test_careless_solutions_add_where_they_should_subtract():
    problems = make_problems("train", 600, careless=0.6)
    rewards = math_reward(completions=problems["completion"], answer=problems["answer"])
    solutions = [messages[0]["content"] for messages in problems["completion"]]
    added = ["+" in solution for solution in solutions]
    for text, solution, reward, adds in zip(texts(problems), solutions, rewards, added):
        a, b = map(int, re.findall(r"\d+", text))
        assert solution == work_out(a, "+" if adds else "-", b)  # the arithmetic itself is right
        assert reward == float(not adds or numbers_and_result(text) == a + b)
    wrong = rewards.count(0.0)
    assert 0.5 < wrong / (wrong + added.count(False)) < 0.7  # of the subtraction problems


def test_tokenizer_knows_every_word_and_gives_the_text_back():
    tokenizer = make_tokenizer()
    for row in make_problems("train", 400, careless=0.5):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert ids[-1] == tokenizer.eos_token_id
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id} == {0, 1, 2}


def test_chat_template_of_a_prompt_is_a_prefix_of_the_whole():
    tokenizer = make_tokenizer()
    row = make_problems("train", 1)[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_model_decodes_like_its_tokenizer_says():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=1)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    again, other = make_model(tokenizer, seed=1), make_model(tokenizer, seed=2)
    assert model.lm_head.weight.equal(again.lm_head.weight)
    assert not model.lm_head.weight.equal(other.lm_head.weight)


def test_every_story_asks_with_both_numbers():
    for stories in STORIES.values():
        for story in stories:
            assert "{a}" in story and "{b}" in story and story.endswith("?")
