"""What decoding takes behind every door, in every family: models as training leaves them, padding, broken weights."""

import pytest
import torch

from dllm_trl.generation import generate_rollouts
from tests.trainers.tiny_rl import TINY, make_model


FAMILY = pytest.mark.parametrize("family", TINY)
KW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
PROMPT = torch.tensor([[10, 11, 12, 13, 14]])


@FAMILY
def test_a_model_in_training_decodes_as_in_evaluation_and_stays_in_training(family):
    model = make_model(family, attention_dropout=0.5)
    expected = model.eval().generate(PROMPT, **KW)
    model.gradient_checkpointing_enable()
    model.train()
    frozen = model.get_input_embeddings().eval()
    assert torch.equal(model.generate(PROMPT, **KW), expected)
    rollout = generate_rollouts(model, PROMPT.tolist(), model.generation_config, max_new_tokens=8, seed=0)
    assert torch.equal(
        generate_rollouts(model.eval(), PROMPT.tolist(), max_new_tokens=8, seed=0).canvas_ids, rollout.canvas_ids
    )
    model.train()
    frozen.eval()
    model.generate(PROMPT, **KW)
    assert [module for module in model.modules() if not module.training] == [frozen]


@FAMILY
def test_left_padding_without_a_mask_is_inferred(family):
    model = make_model(family).eval()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    alone = model.generate(PROMPT, **KW)
    assert torch.equal(model.generate(padded, **KW)[:, 3:], alone)
    # A pad token that ends texts, and one inside a prompt, are tokens of the prompt
    kw = KW | {"eos_token_id": [0]}
    ones = torch.ones_like(padded)
    assert torch.equal(model.generate(padded, **kw), model.generate(padded, attention_mask=ones, **kw))
    inside = torch.tensor([[10, 0, 11, 0, 12]])
    assert torch.equal(
        model.generate(inside, **KW), model.generate(inside, attention_mask=torch.ones_like(inside), **KW)
    )


@FAMILY
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.0, "seed": 0}])
def test_logits_that_are_nan_are_named_with_their_step(family, sampling):
    model = make_model(family).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite in row 0, denoising step 0"):
        model.generate(PROMPT, **(KW | sampling))
