"""NEFTune in SFT: noise of the size of the sequence itself, the same for all copies of a token, in any batch."""

import math
from itertools import product

import pytest
import torch

from .test_sft_trainer import assert_same, batch_of, make_trainer, weights
from .tiny_rl import TINY, make_model, make_tokenizer


FAMILIES = pytest.mark.parametrize("family", TINY)
# Two pairs of rows with one prompt, so that prompts could be shared; and a row of twice that length
SHARED = {
    "prompt": ["what is three+four? " * n for n in (1, 1, 2, 1)],
    "completion": ["it is seven!", "seven", "it is seven! ", "seven, it is"],
}


def with_steps():
    """The same rows, tokenised, as three steps each of a decoder committed them."""
    tokenizer, data = make_tokenizer(), {"input_ids": [], "completion_mask": [], "step_map": []}
    for texts in zip(*SHARED.values()):
        prompt, completion = (tokenizer(text)["input_ids"] for text in texts)
        completion.append(tokenizer.eos_token_id)
        data["input_ids"].append(prompt + completion)
        data["completion_mask"].append([0] * len(prompt) + [1] * len(completion))
        data["step_map"].append([-1] * len(prompt) + [i % 3 for i in range(len(completion))])
    return data


def noise_of(trainer, batch):
    """What the decoder gets beyond the embeddings, `(N, H)`, over all forwards, and the positions of its tokens."""
    seen, embedded = [], []
    backbone = trainer.model.model

    def notice(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(((hidden - embedded[-1])[0].detach(), kwargs["position_ids"][0]))

    hooks = [
        backbone.embed_tokens.register_forward_hook(lambda module, args, output: embedded.append(output)),
        backbone.layers[0].register_forward_pre_hook(notice, with_kwargs=True),
    ]
    trainer.compute_loss(trainer.model, batch).backward()
    for hook in hooks:
        hook.remove()
    noise, positions = (torch.cat(part) for part in zip(*seen))
    return noise, positions


@FAMILIES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_of_a_token_have_the_same_noise(tmp_path, family, checkpointing):
    """Within a forward and in what the backward pass computes again, with several rounds and chunks."""
    options = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": checkpointing, "objective": "trace"}
    trainer = make_trainer(tmp_path, with_steps(), make_model(family), **options)
    trainer.model.train()
    for row in range(3):
        batch = batch_of(trainer, row)
        noise, positions = noise_of(trainer, batch)
        rows, _ = trainer._rows(batch)
        length = int(rows.prompt_mask.sum() + rows.canvas_mask.sum())
        assert len(positions) > length  # there are copies
        size = 5.0 / math.sqrt(length * noise.size(1))
        assert 0.95 * size < noise.abs().max() <= size * 1.0001
        for position in positions.unique():
            copies = noise[positions == position]
            torch.testing.assert_close(copies, copies[:1].expand_as(copies), atol=1e-6, rtol=0)
        distinct = noise[[int((positions == p).nonzero()[0]) for p in positions.unique()]]
        assert torch.cdist(distinct, distinct).fill_diagonal_(1).min() > 0.1 * size

    trainer.state.global_step = 1
    assert (noise_of(trainer, batch)[0] - noise).abs().max() > size
    trainer.model.eval()
    assert noise_of(trainer, batch)[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "objective"), [*((family, None) for family in TINY), *product(("sdar", "Dream"), ("ar", "trace"))]
)
def test_noise_does_not_depend_on_what_shares_the_batch(tmp_path, family, objective):
    results = []
    for batch, alpha, checkpointing in ((4, 5.0, False), (1, 5.0, False), (2, 5.0, True), (4, None, False)):
        trainer = make_trainer(
            tmp_path,
            with_steps() if objective == "trace" else SHARED,
            make_model(family),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            objective=objective,
            neftune_noise_alpha=alpha,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        results.append(weights(trainer))
    for got in results[1:3]:
        assert_same(got, results[0], atol=2e-6)
    with pytest.raises(AssertionError):
        assert_same(results[3], results[0], atol=1e-4)


def test_adapters_get_noise_too(tmp_path):
    peft = pytest.importorskip("peft")
    results = []
    for alpha in (None, 0.0, 5.0):
        trainer = make_trainer(
            tmp_path, SHARED, peft_config=peft.LoraConfig(init_lora_weights=False), neftune_noise_alpha=alpha
        )
        results.append(trainer.compute_loss(trainer.model.train(), batch_of(trainer, 0, 2)).item())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_a_size_that_is_none_is_refused(tmp_path, alpha):
    with pytest.raises(ValueError, match="`neftune_noise_alpha` must be 0 or more"):
        make_trainer(tmp_path, neftune_noise_alpha=alpha)
