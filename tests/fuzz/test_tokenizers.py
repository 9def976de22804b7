import pytest
from datasets import Dataset

from dllm_trl.evaluation import evaluate_accuracy

from ..trainers.tiny_rl import make_model, make_tokenizer
from .doors import judge
from .test_datasets import larger, train, without


pytestmark = pytest.mark.slow
MESSAGES = Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]] * 8})
PAIRS = Dataset.from_dict({"prompt": MESSAGES["prompt"], "completion": [[{"role": "assistant", "content": "b"}]] * 8})


def templated(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("door", ["rl", "sft", "evaluation"])
def test_tokenizers(door, tmp_path):
    def call(tokenizer, model=None):
        model = model or make_model()
        if door == "evaluation":
            model.generation_config.max_new_tokens = 4
            problems = [{"prompt": prompt} for prompt in MESSAGES["prompt"]]
            return evaluate_accuracy(model, tokenizer, problems, lambda completions, **kw: [1.0] * len(completions))
        return train(
            door, tmp_path, processing_class=tokenizer, model=model, train_dataset=MESSAGES if door == "rl" else PAIRS
        )

    argument = "tokenizer" if door == "evaluation" else "processing_class"
    rows = [
        (argument, "text", lambda: call("tokenizer")),
        (argument, "number", lambda: call(3)),
        (argument, "class", lambda: call(type(make_tokenizer()))),
        ("chat.template", "none", lambda: call(templated(None))),
        ("template", "cut off", lambda: call(templated("{% for message in messages %}{{ message"))),
        ("template", "unknown loop", lambda: call(templated("{% repeat %}"))),
        ("template", "missing name", lambda: call(templated("{{ messages[0].author.name }}"))),
        ("template", "raises", lambda: call(templated("{{ raise_exception('bad template') }}"))),
        ("empty|no tokens|nothing", "says nothing", lambda: call(templated("{{ '' }}"))),
        ("vocabulary|input_ids|the model", "larger", lambda: call(with_larger_ids())),
        ("mask", "beyond", lambda: call(make_tokenizer(), make_model(mask_token_id=10**6))),
    ]
    if door != "evaluation":
        rows.append(("EOS", "no EOS", lambda: call(without("eos_token"))))
        rows.append(("mask", "none", lambda: call(without("mask_token"), make_model(mask_token_id=None))))
    judge(f"tokenizers, {door}", rows)


def with_larger_ids():
    tokenizer = larger()
    tokenizer.chat_template = "{{ 'word7' }}{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    return tokenizer
