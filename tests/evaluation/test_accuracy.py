import copy
import functools
import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_trl.evaluation import evaluate_accuracy
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM


SPECIAL = ["<pad>", "<eos>", "<mask>", "<user>", "<assistant>"]
CHARACTERS = "0123456789+=\\boxed{} "
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROBLEMS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(CHARACTERS)])}
    characters = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = SDARConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return SDARForCausalLM(config).eval()


@pytest.fixture
def sampling():
    return DiffusionGenerationConfig(max_new_tokens=30, temperature=2.0, block_length=4, denoising_steps=2)


def even_length(completions, **kwargs):
    return [float(len(completion) % 2 == 0) for completion in completions]


def test_report(model, tokenizer, sampling):
    report = evaluate_accuracy(model, tokenizer, PROBLEMS, even_length, sampling, seed=3, show_progress=False)
    sampling.eos_token_id = tokenizer.eos_token_id  # the model names no EOS
    prompts = [tokenizer(problem["prompt"])["input_ids"] for problem in PROBLEMS]
    rollout = generate_rollouts(model, prompts, sampling, seed=3)
    lengths = rollout.completion_mask.sum(1).tolist()
    last = rollout.completion_ids[range(12), [length - 1 for length in lengths]]
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)

    assert [record["completion"] for record in report.records] == texts
    assert [record["completion_length"] for record in report.records] == lengths
    assert [record["ended_with_eos"] for record in report.records] == (last == tokenizer.eos_token_id).tolist()
    assert [record["num_forward_passes"] for record in report.records] == rollout.num_forward_passes.tolist()
    assert [record["correct"] for record in report.records] == [len(text) % 2 == 0 for text in texts]
    assert [{key: record[key] for key in ("prompt", "answer")} for record in report.records] == PROBLEMS
    assert report.accuracy == sum(len(text) % 2 == 0 for text in texts) / 12
    assert report.tokens_per_forward == pytest.approx(rollout.tokens_per_forward)
    assert report.mean_completion_length == pytest.approx(sum(lengths) / 12)
    assert report.eos_share == (last == tokenizer.eos_token_id).float().mean()
    assert 0 < report.accuracy < 1 and 0 < report.eos_share < 1  # the test sees both
    assert (report.num_problems, report.num_skipped) == (12, 0)


def test_report_names_the_effective_decoding(model, tokenizer):
    """What the call leaves out is the checkpoint's, then the library's; all of it is in the report, ready for JSON."""

    def own(scores, masked, quota, **kwargs):
        return masked

    model.generation_config = DiffusionGenerationConfig(
        max_new_tokens=6, temperature=0.7, top_k=3, remasking_strategy="margin", eos_token_id=1
    )
    asked = DiffusionGenerationConfig(block_length=2)
    decoding = evaluate_accuracy(model, tokenizer, PROBLEMS[:2], even_length, asked, show_progress=False).decoding
    expected = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 1.0, "seed": 0}
    expected |= {"remasking_strategy": "margin", "block_length": 2, "denoising_steps": 2, "eos_token_id": 1}
    assert expected.items() <= decoding.items()
    asked = DiffusionGenerationConfig(do_sample=False, remasking_strategy=own)
    decoding = evaluate_accuracy(model, tokenizer, PROBLEMS[:2], even_length, asked, show_progress=False).decoding
    assert (decoding["do_sample"], decoding["remasking_strategy"], decoding["block_length"]) == (False, "own", 4)
    json.dumps(decoding)


def test_batch_size_and_slots_change_nothing(model, tokenizer, sampling):
    reports = [
        evaluate_accuracy(
            model, tokenizer, PROBLEMS, even_length, sampling, num_slots, batch_size, seed=3, show_progress=False
        )
        for num_slots, batch_size in ((32, 256), (1, 256), (2, 5), (None, 1))
    ]
    assert all(report.records == reports[0].records for report in reports)
    assert reports[0].records != evaluate_accuracy(model, tokenizer, PROBLEMS, even_length, sampling, seed=4).records


def test_math_reward_is_the_default(model, tokenizer, sampling, monkeypatch):
    texts = [rf"\boxed{{{problem['answer']}}}" for problem in PROBLEMS[:9]] + [r"\boxed{1}"] * 3
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **kwargs: texts)
    report = evaluate_accuracy(model, tokenizer, PROBLEMS, generation_config=sampling, show_progress=False)
    assert report.accuracy == 0.75
    assert [record["reward"] for record in report.records] == [1.0] * 9 + [0.0] * 3


def test_messages(model, tokenizer, sampling):
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [1.0] * len(prompts)

    begun = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    problems = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}, {"prompt": begun, "answer": "2"}]
    problems = Dataset.from_list(problems)
    report = evaluate_accuracy(model, tokenizer, problems, reward, sampling, seed=3, show_progress=False)
    ids = [tokenizer(text)["input_ids"] for text in ("<user>1+1=<assistant>", "<user>1+1=<assistant>2")]
    sampling.eos_token_id = tokenizer.eos_token_id
    rollout = generate_rollouts(model, ids, sampling, seed=3)
    assert seen["completion_ids"] == [
        row[mask == 1].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask)
    ]
    assert seen["answer"] == ["2", "2"] and seen["prompts"] == problems["prompt"]
    assert seen["completions"] == [[{"role": "assistant", "content": r["completion"]}] for r in report.records]


def test_problems_without_a_reward_do_not_count(model, tokenizer, sampling):
    def some(completions, **kwargs):
        return [1.0, None, 0.0, math.nan, 1.0, 0.4][: len(completions)]

    report = evaluate_accuracy(model, tokenizer, PROBLEMS[:6], some, sampling, show_progress=False)
    assert (report.accuracy, report.num_problems, report.num_skipped) == (0.5, 6, 2)
    none = evaluate_accuracy(
        model, tokenizer, PROBLEMS[:2], lambda **kwargs: [None, None], sampling, show_progress=False
    )
    assert math.isnan(none.accuracy)


@pytest.mark.parametrize("where", ["config", "model"])
def test_eos_of_the_config_and_of_the_model_come_before_the_tokenizers(model, tokenizer, sampling, where):
    holder = sampling if where == "config" else model.generation_config
    holder.eos_token_id = [tokenizer.convert_tokens_to_ids("7"), tokenizer.convert_tokens_to_ids("=")]
    report = evaluate_accuracy(model, tokenizer, PROBLEMS, even_length, sampling, seed=3, show_progress=False)
    assert {r["completion"][-1] for r in report.records if r["ended_with_eos"]} == {"7", "="}
    assert all(r["completion_length"] == 30 for r in report.records if not r["ended_with_eos"])


def test_the_model_and_the_config_stay_as_they_were(model, tokenizer, sampling):
    before = sampling.to_dict()

    def fails(**kwargs):
        assert not model.training
        raise RuntimeError("no reward today")

    model.train()
    with pytest.raises(RuntimeError, match="no reward today"):
        evaluate_accuracy(model, tokenizer, PROBLEMS, fails, sampling, show_progress=False)
    assert model.training
    assert sampling.to_dict() == before


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "`problems` is empty"),
        ([{"question": "1+1=", "answer": "2"}], r'`problems\[0\]` needs a "prompt".*has \[\'answer\', \'question\'\]'),
        ([{"prompt": "", "answer": "2"}], r'`problems\[0\]` needs a "prompt"'),
        ([{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2="}], r"`problems\[1\]` has \['prompt'\]"),
        ([{"prompt": "1+1="}], r"neither `answer` nor `solution`"),
    ],
)
def test_bad_problems(model, tokenizer, sampling, problems, message):
    with pytest.raises(ValueError, match=message):
        evaluate_accuracy(model, tokenizer, problems, generation_config=sampling, show_progress=False)


def test_bad_arguments(model, tokenizer, sampling):
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1"):
        evaluate_accuracy(model, tokenizer, PROBLEMS, generation_config=sampling, batch_size=0)
    with pytest.raises(ValueError, match="`num_slots` must be an integer of at least 1"):
        evaluate_accuracy(model, tokenizer, PROBLEMS, generation_config=sampling, num_slots=0, show_progress=False)
    with pytest.raises(ValueError, match="`reward_func` gave 1 rewards for 12 completions"):
        evaluate_accuracy(model, tokenizer, PROBLEMS, lambda **kwargs: [1.0], sampling, show_progress=False)


def test_progress_bar(model, tokenizer, sampling, capsys):
    evaluate_accuracy(model, tokenizer, PROBLEMS, even_length, sampling, batch_size=5)
    assert "12/12" in capsys.readouterr().err


def test_everything_is_checked_before_the_first_batch(model, tokenizer, sampling):
    problems = [{"prompt": f"{i}+1=", "answer": "1"} for i in range(6)] + [{"prompt": "1" * 500, "answer": "1"}]
    judged = []
    reward = functools.partial(lambda completions, **kwargs: judged.extend(completions))
    with pytest.raises(ValueError, match="Prompt 6 has 500 tokens.*Shorten the prompt or lower `max_new_tokens`"):
        evaluate_accuracy(model, tokenizer, problems, reward, sampling, batch_size=2, show_progress=False)
    assert not judged


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"problems": "text"}, "`problems` must be a list of dicts or a `Dataset`, but is a str"),
        ({"problems": {"prompt": ["1"]}}, "`problems` must be a list of dicts or a `Dataset`, but is a dict"),
        ({"problems": None}, "`problems` must be a list of dicts"),
        ({"problems": ["1+1="]}, r"`problems\[0\]` must be a dict with a \"prompt\", but is '1\+1='"),
        ({"batch_size": 1.5}, "`batch_size` must be an integer of at least 1, but is 1.5"),
        ({"num_slots": "4"}, "`num_slots` must be an integer of at least 1"),
        ({"seed": 1.5}, "`seed` must be an integer of at least 0, but is 1.5"),
        ({"reward_func": "math_reward"}, "`reward_func` must be a reward function, but is 'math_reward'"),
        ({"tokenizer": None}, "`tokenizer` must be a tokenizer, but is None"),
    ],
)
def test_arguments_of_an_evaluation(model, tokenizer, sampling, bad, message):
    kwargs = {"problems": [{"prompt": "1+1=", "answer": "2"}], "generation_config": sampling, "show_progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate_accuracy(**{"model": model, "tokenizer": tokenizer, **kwargs, **bad})


def test_a_tokenizer_without_eos(model, tokenizer, sampling):
    bare, without = copy.deepcopy(tokenizer), copy.deepcopy(model)
    bare.eos_token = without.generation_config.eos_token_id = without.config.eos_token_id = None
    config = copy.deepcopy(sampling)
    config.eos_token_id = None
    report = evaluate_accuracy(without, bare, [{"prompt": "1+1=", "answer": "2"}], generation_config=config)
    assert report.eos_share == 0.0 and report.mean_completion_length == config.max_new_tokens
