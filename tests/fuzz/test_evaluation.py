import pytest

from dllm_trl.evaluation import evaluate_accuracy

from ..trainers.tiny_rl import make_model, make_tokenizer
from .doors import NAN, NOT_COUNTS, judge, options


pytestmark = pytest.mark.slow
GOOD = [{"prompt": "1+1=", "answer": "2"}]


def test_evaluation():
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.max_new_tokens = 8
    bare = make_tokenizer()
    bare.chat_template = None

    def call(
        problems=GOOD, tokenizer=tokenizer, reward_func=lambda completions, **kw: [1.0] * len(completions), **bad
    ):
        return evaluate_accuracy(model, tokenizer, problems, reward_func, show_progress=False, **bad)

    rows = options(
        call,
        {
            "problems": [
                [], [{}], [{"prompt": ""}], [{"prompt": []}], [{"prompt": None}], [{"prompt": 3}], [{"prompt": ["a"]}],
                [{"prompt": [{"role": "user"}]}],
                [{"prompt": [1, 2]}], [{"prompt": [{"content": "a"}]}], ["text"], [3],
                [{"question": "1+1"}], [{"prompt": "a"}, {"prompt": "b", "answer": 1}], {"prompt": "a"}, "text",
            ],
            "batch_size": NOT_COUNTS,
            "num_slots": NOT_COUNTS,
            "seed": [1.5, "x", NAN],
            "generation_config": ["x", 3],
            "reward_func": [lambda completions, **kw: [], lambda completions, **kw: [1.0, 2.0], 3],
        },
    )  # fmt: skip
    rows += [("tokenizer", value, lambda v=value: call(tokenizer=v)) for value in (None, "x", 3)]
    messages = [{"prompt": [{"role": "user", "content": "1+1="}]}]
    rows.append(("chat", "no template", lambda: call(messages, bare)))
    rows.append(("prompt", "long", lambda: call([*GOOD, {"prompt": "1" * 500, "answer": "2"}])))
    judge("evaluate_accuracy", rows)
