"""Block decoding with a shifted head (Fast-dLLM v2): each token is read one token earlier, the first one of a block at
the last committed token before it."""

import pytest
import torch
from transformers import set_seed

from dllm_trl.generation import generate_rollouts
from dllm_trl.modeling.fast_dllm import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from dllm_trl.modeling.packing import pack_rounds
from dllm_trl.types import Round

from .conftest import MASK, PAD, VOCAB, left_pad, ragged_prompts
from .test_decoding import STRATEGIES, assert_same, config, uncached


SIZES = (5, 1, 8, 11, 3, 4, 8)  # 4 and 8 end on the edge of a block


@pytest.fixture(scope="module")
def model():
    set_seed(0)
    config = Fast_dLLM_QwenConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        block_size=4,
        mask_token_id=MASK,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Fast_dLLM_QwenForCausalLM(config).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block, steps", [(4, 4), (4, 3), (1, 1), (8, 3)])
@pytest.mark.parametrize("strategy, temperature", [*((name, 0.8) for name in STRATEGIES), ("sequential", 0.0)])
def test_cached_equals_uncached(model, fused, strategy, temperature, block, steps):
    for size in (3, 8, 13):
        prompt = ragged_prompts((size,))[0]
        parameters = config(
            block_length=block,
            denoising_steps=steps,
            remasking_strategy=strategy,
            temperature=temperature,
        )
        rollout = generate_rollouts(model, [prompt], parameters, seed=5, fused=fused)
        ids, step_map, logprobs = uncached(model, prompt, 10, block, steps, strategy, 5, temperature, 0.5, 1.0)
        assert torch.equal(rollout.canvas_ids[0], ids)
        assert torch.equal(rollout.step_map[0], step_map)
        assert (rollout.logprobs[0] - logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slots_siblings_and_batches_change_nothing(model, strategy, fused):
    parameters = config(
        block_length=4, denoising_steps=3, remasking_strategy=strategy, temperature=0.8, eos_token_id=[7, 20, 33]
    )
    prompts, limits = ragged_prompts(SIZES), [10, 3, 12, 4, 9, 14, 1]
    run = {"num_generations": 2, "seed": 1, "fused": fused}
    every = generate_rollouts(model, prompts, parameters, max_new_tokens=limits, **run)
    for slots in (1, 3):
        assert_same(
            generate_rollouts(model, prompts, parameters, max_new_tokens=limits, num_slots=slots, **run), every
        )
    for i, prompt in enumerate(prompts):
        alone = generate_rollouts(model, [prompt], parameters, max_new_tokens=limits[i], index_offset=i, **run)
        assert_same(alone, every, rows_b=slice(2 * i, 2 * i + 2))
    assert_same(
        generate_rollouts(model, prompts, parameters, max_new_tokens=limits, **{**run, "fused": not fused}), every
    )


def test_left_padding_changes_nothing(model):
    prompts = ragged_prompts(SIZES)
    arguments = {"max_new_tokens": 9, "denoising_steps": 2, "eos_token_id": -1}
    batch = model.generate(**left_pad(prompts), **arguments)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **arguments)
        assert torch.equal(batch[i, -9:], alone[0, -9:])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_rollout_and_trainer_read_the_same_log_probs(model, fused, block):
    parameters = config(block_length=block, denoising_steps=3, temperature=0.8, eos_token_id=[7, 20, 33])
    rollout = generate_rollouts(
        model, ragged_prompts(SIZES), parameters, max_new_tokens=14, num_slots=3, seed=3, fused=fused
    )
    steps = rollout.step_map
    rounds = [Round(masked=steps >= step, scored=steps == step) for step in range(int(steps.max()) + 1)]
    packed = pack_rounds(
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.canvas_ids,
        rollout.canvas_mask,
        rounds,
        block_length=block,
        mask_token_id=MASK,
        logit_shift=model.config.logit_shift,
    )
    with torch.no_grad():
        logits = model(
            packed.input_ids, position_ids=packed.position_ids, plan=packed.plan, score_index=packed.score_index
        ).logits
    log_probs = (logits[0] / 0.8).log_softmax(-1).gather(-1, packed.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(packed.scatter(log_probs).sum(0), rollout.logprobs, atol=1e-4, rtol=0)
