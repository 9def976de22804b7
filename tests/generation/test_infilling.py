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


def test_rollouts_have_a_response():
    with pytest.raises(ValueError, match="`max_new_tokens` must be an integer of at least 1"):
        generate_rollouts(make_model("llada"), [[7, 8]], DiffusionGenerationConfig(max_new_tokens=0))


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


def fill(model, ids, mask=None, **kwargs):
    values = {"eos_token_id": -1, "remasking_strategy": "low_confidence_static", "return_dict_in_generate": True}
    return model.generate(torch.tensor(ids), attention_mask=mask, **(values | kwargs))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_one_mask_is_the_argmax_of_a_plain_forward(model, cfg_scale):
    ids = [7, 8, MASK, 10, 11]
    output = fill(model, [ids], max_new_tokens=0, cfg_scale=cfg_scale)
    with torch.no_grad():
        logits, twin = (
            model(input_ids=torch.tensor([row])).logits[0, 2 - model.config.logit_shift] for row in (ids, [MASK] * 5)
        )
    logits = twin + (cfg_scale + 1) * (logits - twin)
    logits[[MASK, *model.config.suppressed_token_ids]] = -torch.inf
    assert output.sequences.tolist() == [[7, 8, int(logits.argmax()), 10, 11]]
    assert output.step_map.shape == output.logprobs.shape == output.canvas_ids.shape == (1, 0)
    assert output.num_forward_passes.tolist() == [1]


def test_the_prompt_is_filled_with_the_response(model):
    """The definition: prompt's masks and the first block's are one block, the later blocks follow."""
    ids, limit, width, shift = [7, MASK, 9, MASK, MASK, 12], 6, 4, model.config.logit_shift
    options = {"block_length": width, "denoising_schedule": "even", "denoising_steps": 99}
    output = fill(model, [ids], max_new_tokens=limit, **options)
    row = torch.tensor(ids + [MASK] * limit)
    for stop in (len(ids) + width, len(ids) + limit):
        while MASK in row[:stop]:
            with torch.no_grad():
                logits = model(input_ids=row[None]).logits[0]
            places = (row[:stop] == MASK).nonzero().squeeze(-1)
            log_probs = logits[places - shift].log_softmax(-1)
            log_probs[:, [MASK, *model.config.suppressed_token_ids]] = -torch.inf
            best, tokens = log_probs.max(-1)
            row[places[best.argmax()]] = tokens[best.argmax()]
    assert output.sequences[0].tolist() == row.tolist()
    assert output.num_forward_passes.item() == 3 + limit
    assert (output.step_map >= 0).all() and output.canvas_ids.tolist() == [row[len(ids) :].tolist()]


@pytest.mark.parametrize("options", [{}, {"block_length": 2, "cfg_scale": 0.5, "remasking_strategy": "random"}])
@pytest.mark.parametrize("max_new_tokens", [0, 5])
def test_rows_do_not_depend_on_the_batch(model, options, max_new_tokens):
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": max_new_tokens, "denoising_steps": 2} | options
    first, others = [7, MASK, MASK, 9], [[8, 9, 10, 11, MASK, 13, MASK], [8, 9, 10], [9, MASK]]
    alone = fill(model, [first], **options)
    rows = [first, *others]
    padded = [[PAD] * (7 - len(row)) + row for row in rows]
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in rows])
    together = fill(model, padded, mask, **options)
    assert together.sequences[0, 3:].tolist() == alone.sequences[0].tolist()
    assert together.num_forward_passes[0] == alone.num_forward_passes[0]
    torch.testing.assert_close(together.logprobs[:1], alone.logprobs, atol=1e-4, rtol=1e-4)
    assert not (together.sequences == MASK).any()
    kept = torch.tensor(padded) != MASK
    assert (together.sequences[:, :7][kept] == torch.tensor(padded)[kept]).all()
    assert together.sequences.equal(fill(model, padded, mask, **options).sequences)
    siblings = fill(model, [first], num_return_sequences=6, **options).sequences
    assert siblings[0].tolist() == alone.sequences[0].tolist() and len(siblings[:, 1:3].unique(dim=0)) > 1


@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_a_whole_row_beside_one_that_begins_later(family):
    """Blocks begin where a row's first mask is: at its first token, and behind a prompt without any."""
    model = make_model(family).eval()
    ids = torch.tensor([[MASK, 8, MASK, 10, 11, 12], [13, 14, 15, 16, 17, 18]])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    together = model.generate(ids, **options)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], atol=1e-5, rtol=0)


def test_rules_of_the_response_leave_the_prompt_alone(model):
    ids = [[7, 8, 9, MASK]]
    free = fill(model, ids, max_new_tokens=0).sequences
    assert fill(model, ids, max_new_tokens=0, forced_eos_token_id=5).sequences.equal(free)


def test_what_infilling_cannot_do_is_refused(model):
    ids = [[7, MASK, 9]]
    for cache in ("prefix", "dual"):
        with pytest.raises(ValueError, match=f'`cache=.{cache}.` cannot fill.*`cache="none"`'):
            fill(model, ids, max_new_tokens=4, cache=cache)
    with pytest.raises(ValueError, match="max_new_tokens.*no mask to fill"):
        fill(model, [[7, 8]], max_new_tokens=0)
    order = {"remasking_strategy": "sequential", "denoising_schedule": "even", "no_repeat_ngram_size": 2}
    fill(model, [[7, 8]], max_new_tokens=4, **order)
    with pytest.raises(ValueError, match="no_repeat_ngram_size.*no masks in the prompt"):
        fill(model, ids, max_new_tokens=4, **order)
    first = [[MASK, 8, 9]]
    if model.config.logit_shift:
        with pytest.raises(ValueError, match=r"input_ids\[0\].*position 0.*logit_shift.*BOS"):
            fill(model, first, max_new_tokens=0)
    else:
        assert fill(model, first, max_new_tokens=0).sequences[0, 0] != MASK
