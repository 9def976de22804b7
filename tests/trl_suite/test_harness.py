"""The harness that runs TRL's own tests, as far as it can be tested without them."""

from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .refused import REFUSED, listed, refusal
from .run import compare
from .stand_ins import make_tokenizer, names_in, write_stand_ins


SOURCE = """
load_dataset("trl-internal-testing/zen", "standard_prompt_only")
"trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", "trl-internal-testing/tiny-Qwen3MoeForCausalLM"
"trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5", "trl-internal-testing/tiny-RemoteForCausalLM"
"trl-internal-testing/tiny-LlavaForConditionalGeneration", "trl-internal-testing/no-such-thing"
"""


@pytest.mark.parametrize(
    ("diffusion", "types"), [(False, ["qwen2", "qwen3_moe"]), (True, ["sdar", "sdar_moe"])], ids=["stock", "ours"]
)
def test_stand_ins_are_found_by_name(tmp_path, monkeypatch, diffusion, types):
    missing = write_stand_ins(tmp_path, names_in([SOURCE]), diffusion)
    assert missing == {"tiny-LlavaForConditionalGeneration": "reads images", "no-such-thing": "unknown"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = load_dataset("trl-internal-testing/zen", "standard_prompt_only")
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 17, "test": 2}
    assert dataset["train"][1] == {"prompt": "Explicit is"}
    conversations = load_dataset("trl-internal-testing/zen", "conversational_language_modeling", split="train")
    tokenizer = AutoTokenizer.from_pretrained("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5")
    encoded = tokenizer.apply_chat_template(
        conversations[0]["messages"], return_assistant_tokens_mask=True, return_dict=True
    )
    trained = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "ugly.<|im_end|>\n"
    names = ("tiny-Qwen2ForCausalLM-2.5", "tiny-Qwen3MoeForCausalLM")
    found = [AutoModelForCausalLM.from_pretrained(f"trl-internal-testing/{name}") for name in names]
    assert [model.config.model_type for model in found] == types
    assert all(model.config.vocab_size == len(tokenizer) for model in found)
    reward = "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5"
    assert AutoModelForSequenceClassification.from_pretrained(reward).config.num_labels == 1


def test_wide_tokenizer_has_the_ids_that_the_tests_write_out():
    tokenizer = make_tokenizer(wide=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151643, 151645)
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) is not None


def test_every_refusal_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "trl_compatibility.md").read_text()
    for item in REFUSED:
        assert f"- {item.feature}" in page


def test_only_the_expected_message_counts_as_refused():
    test = "test_sft_trainer.py::TestSFTTrainer::test_prompt_tuning"
    assert refusal(test, "`peft_config` has a `PromptTuningConfig`, which adds virtual tokens: ...") is listed(test)
    assert refusal(test, "KeyError: 'labels'") is None
    assert refusal("test_sft_trainer.py::TestSFTTrainer::test_train", "adds virtual tokens") is None


def test_outcomes_are_sorted():
    def record(outcome, reason=""):
        return {"outcome": outcome, "reason": reason}

    stock = {name: record("passed") for name in ("a", "b", "test_prompt_tuning", "gone")}
    stock |= {"c": record("failed", "no such file"), "d": record("skipped", "needs a GPU")}
    ours = {
        "a": record("passed"),
        "b": record("failed", "wrong"),
        "test_prompt_tuning": record("failed", "adds virtual tokens"),
        "c": record("failed"),
        "d": record("skipped"),
    }
    same, refused, failed = compare(stock, ours)
    assert same == ["a"]
    assert [name for name, _ in refused] == ["test_prompt_tuning"]
    assert failed == [("b", "failed: wrong"), ("gone", "crashed")]
