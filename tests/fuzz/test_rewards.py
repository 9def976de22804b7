import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.rewards import format_reward, math_reward

from .doors import NAN, judge, options


pytestmark = pytest.mark.slow


def test_arguments():
    def call(completions=(r"\boxed{1}",), answer=("1",), **bad):
        return math_reward(list(completions) if isinstance(completions, tuple) else completions, answer, **bad)

    table = options(
        call,
        {
            "time_limit": [0, -1, NAN, float("inf"), 1e10, "x", [], {}],
            "answer": [[], ["1", "2"], None],
        },
    )
    judge("math_reward", table)
    patterns = {"pattern": ["(", "[", "*", 3, b"x", ["a"], "(?P<n", r"\1"]}
    judge("format_reward", options(lambda **bad: format_reward(["x"], **bad), patterns))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["\\boxed", "{", "}", "1", "\\", "<answer>", "</answer>", "\n", "$", "٣"]), max_size=30)
)
def test_any_text_gets_a_reward(pieces):
    text = "".join(pieces)
    assert math_reward([text], answer=["7"]) in ([0.0], [None])  # nowhere is there a 7
    assert format_reward([text])[0] in (0.0, 1.0)
