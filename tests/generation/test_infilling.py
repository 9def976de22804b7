"""Masks inside a prompt: full attention fills them in place, and whatever cannot says so."""

import pytest
import torch
from datasets import Dataset

from dllm_trl import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dllm_trl.evaluation import evaluate_accuracy
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from tests.trainers.tiny_rl import BLOCK, FULL, ON_CPU, letter_reward, make_model, make_tokenizer


MASK, PAD = 2, 0


@pytest.fixture(scope="module", params=FULL)
def model(request):
    return make_model(request.param).eval()


@pytest.fixture(scope="module", params=BLOCK)
def block_model(request):
    return make_model(request.param).eval()


def test_block_families_refuse_masks_in_prompts(block_model):
    ids = torch.tensor([[7, 8, 9], [7, MASK, 9]])
    with pytest.raises(ValueError, match=r"input_ids\[1\] holds the mask token \(id 2\) at position 1.*Leave masks"):
        block_model.generate(ids, max_new_tokens=4)
    padded = torch.tensor([[PAD, 7, MASK]])
    with pytest.raises(ValueError, match="position 1 of its tokens"):
        block_model.generate(padded, attention_mask=torch.tensor([[0, 1, 1]]), max_new_tokens=4)


@pytest.mark.parametrize("family", [*FULL, *BLOCK])
def test_rollouts_refuse_masks_in_prompts(family):
    model, tokenizer = make_model(family), make_tokenizer()
    with pytest.raises(ValueError, match=r"prompts\[1\] holds the mask token \(id 2\) at position 2"):
        generate_rollouts(model, [[7, 8], [7, 8, MASK, 9]], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"prompts\[0\] holds the mask token"):
        evaluate_accuracy(
            model,
            tokenizer,
            [{"prompt": "1+<mask>=3", "answer": "2"}],
            generation_config=DiffusionGenerationConfig(max_new_tokens=4),
            show_progress=False,
        )


def test_the_id_of_this_call_counts(block_model):
    generate_rollouts(block_model, [[7, MASK]], DiffusionGenerationConfig(mask_token_id=3), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"id 3\)"):
        generate_rollouts(block_model, [[7, 3]], DiffusionGenerationConfig(mask_token_id=3), max_new_tokens=2)


@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("prompt", ["1+<mask>=3", [{"role": "user", "content": "1+<mask>=3"}]])
def test_trainers_refuse_masks_in_prompts(family, prompt, tmp_path):
    fine = "1+1=" if isinstance(prompt, str) else [{"role": "user", "content": "1+1="}]
    with pytest.raises(ValueError, match=r"`train_dataset\[1\]\['prompt'\]` holds the mask token '<mask>' \(id 2\)"):
        DiffusionGRPOTrainer(
            make_model(family),
            letter_reward,
            DiffusionGRPOConfig(tmp_path, max_completion_length=8, num_generations=2, **ON_CPU),
            train_dataset=Dataset.from_dict({"prompt": [fine, prompt] * 4}),
            processing_class=make_tokenizer(),
        )
