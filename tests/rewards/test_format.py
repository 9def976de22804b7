import pytest

from dllm_trl.rewards import format_reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", 1.0),
        (r"So it is $\boxed {4}$.", 1.0),
        (r"The set is \boxed{\{1, 2\}}.", 1.0),
        ("So it is 4.", 0.0),
        (r"So it is \boxed{}.", 0.0),
        (r"So it is \boxed{ }.", 0.0),
        (r"So it is \boxed{\frac{1}{2}", 0.0),  # cut off
        (r"It is \boxed{3}, no, \boxed{4}.", 0.0),
        (r"It is \boxed{\boxed{4}}.", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_one_box(text, reward):
    assert format_reward([text]) == [reward]
    assert format_reward([[{"role": "assistant", "content": text}]], prompts=["?"], completion_ids=[[1]]) == [reward]


def test_pattern():
    pattern = r"\A<think>.+</think>.*\Z"
    texts = ["<think>\nhm\n</think>\n4", "first <think>hm</think> 4", r"\boxed{4}", None]
    assert format_reward(texts, pattern=pattern) == [1.0, 0.0, 0.0, 0.0]


def test_the_last_message_counts():
    messages = [{"role": "assistant", "content": "let me see"}, {"role": "assistant", "content": r"\boxed{4}"}]
    assert format_reward([messages, messages[::-1], []]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("pattern", ["(", 4, ["a"]])
def test_a_pattern_that_is_none(pattern):
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression as a string, but is"):
        format_reward(["4"], pattern=pattern)
