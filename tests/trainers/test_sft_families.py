"""Every SFT objective with every family it is for: the trainer's loss against plain forwards, data, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from dllm_trl import DiffusionGenerationConfig, DiffusionSFTTrainer
from dllm_trl.generation import generate_rollouts
from dllm_trl.objectives import SFT_OBJECTIVES
from dllm_trl.types import Round

from . import tiny_rl
from .test_sft_trainer import EOS, MASK, PAIRS, assert_same, batch_of, corruption, make_trainer, weights
from .tiny_rl import TINY, make_model, make_tokenizer


FULL = pytest.mark.parametrize("family", tiny_rl.FULL)


def attention(family):
    return make_model(family).config.diffusion_attention


def plain_loss(model, rows, round_, loss_norm, is_causal=False):
    """Row by row: a forward over [prompt | noisy canvas], the weighted sum of nll, divided by what METHODS says."""
    losses = []
    shift = 1 if is_causal else model.config.logit_shift
    for i in range(len(rows)):
        prompt = rows.prompt_ids[i][rows.prompt_mask[i] == 1]
        columns = rows.canvas_mask[i].nonzero().flatten()
        clean = rows.canvas_ids[i, columns]
        seen = clean if is_causal else clean.masked_fill(round_.masked[i, columns], MASK)
        logits = model(torch.cat([prompt, seen])[None], is_causal=is_causal).logits[0]
        logits = logits[len(prompt) - shift : len(prompt) - shift + len(clean)]
        nll = -logits.log_softmax(-1).gather(1, clean[:, None])[:, 0]
        weight = 1 if round_.loss_weight is None else round_.loss_weight[i, columns]
        losses.append((nll * weight * round_.scored[i, columns]).sum())
    trained = rows.trained.sum(1)
    assert trained.min() < trained.max()  # or the norms were the same
    if loss_norm == "sequence":
        return (torch.stack(losses) / trained).mean()
    return sum(losses) / (trained if loss_norm == "token" else round_.scored).sum()


@FULL
@pytest.mark.parametrize(
    ("options", "loss_norm"),
    [
        ({}, "sequence"),
        ({"loss_norm": "token"}, "token"),
        ({"weighting": "cart"}, "sequence"),
        ({"weighting": "mean", "noise_eps": 0.1, "noise_max": 0.9}, "sequence"),
        ({"weighting": "none"}, "masked"),
        ({"objective": "semi_ar", "block_length": 5}, "sequence"),
        ({"objective": "ar"}, "token"),
    ],
    ids=["elbo", "token", "cart", "mean", "none", "semi_ar", "ar"],
)
def test_loss_is_that_of_plain_forwards(tmp_path, family, options, loss_norm):
    trainer = make_trainer(tmp_path, model=make_model(family), **options)
    batch = batch_of(trainer, 0, 4, 7, 11)
    rows, (round_,) = corruption(trainer, batch)
    assert round_.scored.any()
    with torch.no_grad():
        expected = plain_loss(trainer.model.eval(), rows, round_, loss_norm, options.get("objective") == "ar")
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-6)


@FULL
def test_a_slice_counts_with_its_mean(tmp_path, family):
    trainer = make_trainer(tmp_path, model=make_model(family), objective="semi_ar", block_length=5)
    batch = batch_of(trainer, 0, 4, 7, 11)
    rows, (round_,) = corruption(trainer, batch)
    alone = []
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model.eval(), {**batch, "rows": (rows, [round_], None)})
    for i in range(4):
        one = Round(round_.masked[i : i + 1], round_.scored[i : i + 1])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, {**batch, "rows": (rows[i : i + 1], [one], None)})
        alone.append(loss * rows.trained[i].sum() / one.scored.sum())
    torch.testing.assert_close(together, sum(alone) / 4, rtol=1e-5, atol=1e-6)


def test_autoregressive_is_trls_own(tmp_path):
    """Dream is Qwen2: under causal attention it must get the loss and the gradients of TRL's SFTTrainer on Qwen2."""
    model = make_model("Dream")
    config = model.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    stock = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            tie_word_embeddings=False,
            rope_parameters=dict(config.rope_parameters),
            rms_norm_eps=config.rms_norm_eps,
            **{name: getattr(config, name) for name in names},
        )
    )
    stock.load_state_dict(model.state_dict())
    options = {"max_length": 64, "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1}
    options |= {"optim": "sgd", "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    theirs = SFTTrainer(
        stock,
        args=SFTConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=make_tokenizer(),
    )
    ours = make_trainer(tmp_path, model=model, objective="ar", **options)
    for trainer in (theirs, ours):
        trainer.train()
    a, b = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-5)
    assert_same(weights(ours), weights(theirs), atol=1e-5)


def step_map_data(rows=6):
    """Already tokenised rows with made-up step maps; some tokens were never committed."""
    generator = torch.Generator().manual_seed(0)
    data = {"input_ids": [], "completion_mask": [], "step_map": []}
    for i in range(rows):
        prompt, response = 3 + i % 4, 5 + 2 * (i % 3)
        ids = torch.randint(6, 50, (prompt + response,), generator=generator).tolist()
        steps = torch.randint(0, 4, (response,), generator=generator).tolist()
        if i == 1:
            steps[-1] = -1
        data["input_ids"].append(ids[:-1] + [EOS])
        data["completion_mask"].append([0] * prompt + [1] * response)
        data["step_map"].append([-1] * prompt + steps)
    return data


FITTING = [(f, name) for f in TINY for name in SFT_OBJECTIVES if attention(f) in SFT_OBJECTIVES[name].attentions]


@pytest.mark.parametrize(("family", "objective"), FITTING)
def test_every_objective_trains_every_family_it_fits(tmp_path, family, objective):
    data = step_map_data() if objective == "trace" else PAIRS
    options = {"block_length": 4} if objective == "semi_ar" else {}
    trainer = make_trainer(tmp_path, data, make_model(family), objective=objective, max_steps=2, **options)
    before = weights(trainer)
    trainer.train()
    assert all(torch.isfinite(after).all() for after in weights(trainer).values())
    assert any((after - before[name]).abs().max() > 0 for name, after in weights(trainer).items())
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


@pytest.mark.parametrize("objective", ["random_mask", "semi_ar", "ar", "trace"])
def test_accumulation_does_not_change_the_step(tmp_path, objective):
    results = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            step_map_data() if objective == "trace" else PAIRS,
            make_model("Dream"),
            objective=objective,
            block_length=4 if objective == "semi_ar" else None,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        results.append(weights(trainer))
    assert_same(results[1], results[0])


@FULL
def test_a_batch_that_masks_nothing_is_a_step_without_loss(tmp_path, family):
    def nothing(rows):
        return [Round(rows.trained & False, rows.trained & False)]

    trainer = make_trainer(tmp_path, model=make_model(family), objective=nothing, max_steps=2, weight_decay=0.0)
    before = weights(trainer)
    trainer.train()
    assert_same(weights(trainer), before, atol=0)


# --------------------------------------------------------------------------------------------------------------- fill


def corrupted(trainer, *batches):
    found, _ = trainer.get_batch_samples(
        iter([batch_of(trainer, *rows) for rows in batches]), len(batches), torch.device("cpu")
    )
    return [(rows, source) for rows, _, source in (batch["rows"] for batch in found)]


def lengths(rows):
    return (rows.prompt_mask.sum(1) + rows.canvas_mask.sum(1)).tolist()


def test_sequences_are_filled_to_the_longest_of_the_step(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llada"))
    sizes = [len(trainer.train_dataset[i]["input_ids"]) for i in (0, 1, 2, 4)]
    (first, source), (second, _) = corrupted(trainer, (0, 1), (2, 4))
    assert lengths(first) + lengths(second) == [max(sizes)] * 4 and len(set(sizes)) > 1
    filled = source[0][first.canvas_mask[0] == 1] == -1
    assert filled.sum() == max(sizes) - sizes[0]
    assert (first.canvas_ids[0][: len(filled)][filled] == EOS).all() and first.trained[0][: len(filled)].all()
    assert lengths(trainer._rows(batch_of(trainer, 0, 1))[0]) == sizes[:2]  # evaluation: as it is


def test_fill_options(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llada"), eos_fill_length=40)
    assert lengths(corrupted(trainer, (0, 1))[0][0]) == lengths(trainer._rows(batch_of(trainer, 0, 1))[0]) == [40, 40]
    trainer = make_trainer(tmp_path, model=make_model("llada"), eos_fill=False)
    sizes = [len(trainer.train_dataset[i]["input_ids"]) for i in (0, 1)]
    assert lengths(corrupted(trainer, (0, 1))[0][0]) == sizes
    cut = make_trainer(tmp_path, model=make_model("llada"), eos_fill_length=40, max_length=9)
    assert lengths(cut._rows(batch_of(cut, 4))[0]) == [9]
    with pytest.raises(ValueError, match="`eos_fill=True` does not go with `objective='ar'`"):
        make_trainer(tmp_path, model=make_model("llada"), objective="ar", eos_fill=True)
    with pytest.raises(ValueError, match="`eos_fill_length` is for models with full attention"):
        make_trainer(tmp_path, eos_fill_length=40)


# -------------------------------------------------------------------------------------------------------------- trace


def rollout_rows(rollout):
    """What docs/sft_trainer.md says: rows of tokens with their step map, from a rollout."""
    rows = []
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()].tolist()
        exists = rollout.canvas_mask[i].bool()
        rows.append(
            {
                "input_ids": prompt + rollout.canvas_ids[i][exists].tolist(),
                "completion_mask": [0] * len(prompt) + rollout.completion_mask[i][exists].tolist(),
                "step_map": [-1] * len(prompt) + rollout.step_map[i][exists].tolist(),
            }
        )
    return rows


@pytest.mark.parametrize("family", ["sdar", "Dream"])
def test_the_documented_rollouts_can_be_trained_on(tmp_path, family):
    page = (Path(__file__).parents[2] / "docs" / "sft_trainer.md").read_text()
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "generate_rollouts" in code)
    found = {"model": make_model(family).eval(), "tokenizer": make_tokenizer()}
    exec(snippet, found)
    assert found["rows"] == rollout_rows(found["rollout"])
    make_trainer(tmp_path, found["dataset"].to_dict(), make_model(family), objective="trace", max_steps=1).train()


@pytest.mark.parametrize("family", ["sdar", "llada", "Dream"])
def test_trace_is_the_rollout_itself(tmp_path, family):
    """The nll of each token is minus the log-probability that was recorded when it was committed."""
    model = make_model(family).eval()
    prompts = [make_tokenizer()(text)["input_ids"] for text in PAIRS["prompt"][:4]]
    config = DiffusionGenerationConfig(do_sample=True, temperature=1.0, denoising_steps=4)
    rollout = generate_rollouts(model, prompts, config, num_generations=2, max_new_tokens=11, seed=0)
    data = Dataset.from_list(rollout_rows(rollout)).to_dict()
    trainer = make_trainer(tmp_path, data, model, objective="trace", loss_norm="sequence")
    ended = rollout.completion_mask.sum(1) < rollout.canvas_mask.sum(1)
    assert ended.any() and not ended.all()
    for i in range(len(rollout)):
        scored = rollout.completion_mask[i].bool()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), batch_of(trainer, i))
        assert loss.item() == pytest.approx(-rollout.logprobs[i][scored].mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["sdar", "Dream"])
@pytest.mark.parametrize("shrink", [1, 3])
def test_trace_rounds_in_chunks_and_packed(tmp_path, family, shrink):
    options = {"objective": "trace", "shrink": shrink, "model": make_model(family)}
    trainer = make_trainer(tmp_path, step_map_data(), **options)
    rows, rounds = corruption(trainer, batch_of(trainer, *range(6)))
    assert torch.equal(sum(r.scored.int() for r in rounds).bool(), rows.trained)
    assert rows.trained.sum() == sum(s >= 0 for steps in step_map_data()["step_map"] for s in steps)
    assert len(rounds) == (4 if shrink == 1 else 2)
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch_of(trainer, *range(6)))
        for more in (
            {"rounds_per_forward": 3},
            {"packing": True, "max_length": 40},
            {"padding_free": True, "max_length": None},
        ):
            other = make_trainer(tmp_path, step_map_data(), **options, **more)
            batch = batch_of(other, *range(len(other.train_dataset)))
            torch.testing.assert_close(other.compute_loss(other.model, batch), expected, rtol=1e-5, atol=1e-6)


def test_slices_follow_step_maps(tmp_path):
    options = {"model": make_model("llada"), "objective": "semi_ar", "block_length": 2, "eos_fill": False}
    trainer = make_trainer(tmp_path, step_map_data(), **options)
    rows, (round_,) = corruption(trainer, batch_of(trainer, *range(6)))
    for steps, masked, exists in zip(rows.step_map, round_.masked, rows.canvas_mask == 1):
        hidden, shown = steps[masked & (steps >= 0)], steps[exists & ~masked & (steps >= 0)]
        # at most one token of the slice itself is shown
        assert (shown > hidden.min()).sum() <= 1 and len(hidden)
    assert "step_map" not in batch_of(make_trainer(tmp_path, **options), 0, 1)


def test_step_maps_may_cover_the_completion_only(tmp_path):
    full = step_map_data()
    pairs = zip(full["step_map"], full["completion_mask"])
    short = {**full, "step_map": [[step for step, c in zip(*pair) if c] for pair in pairs]}
    trainers = [make_trainer(tmp_path, data, make_model("llada"), objective="trace") for data in (full, short)]
    for i in range(6):
        assert trainers[0].train_dataset[i]["step_map"] == trainers[1].train_dataset[i]["step_map"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_step_maps_are_truncated_with_the_tokens(tmp_path, mode):
    data = step_map_data()
    options = {"objective": "trace", "max_length": 8, "truncation_mode": mode}
    trainer = make_trainer(tmp_path, data, make_model("llada"), **options)
    kept = slice(None, 8) if mode == "keep_start" else slice(-8, None)
    for i in range(6):
        assert trainer.train_dataset[i]["step_map"] == data["step_map"][i][kept]
        assert trainer.train_dataset[i]["input_ids"] == data["input_ids"][i][kept]


def test_text_with_step_maps(tmp_path):
    """Lengths that fit what the text becomes are taken, EOS included; others are an error that says what to do."""
    steps = [list(range(len(c) + 1)) for c in PAIRS["completion"]]
    trainer = make_trainer(tmp_path, {**PAIRS, "step_map": steps}, make_model("Dream"), objective="trace")
    assert trainer.train_dataset[3]["step_map"] == [-1] * len(PAIRS["prompt"][3]) + steps[3]
    steps[5] = steps[5][:-1]
    with pytest.raises(ValueError, match="Row 5 of the train dataset: `step_map` has.*Store token ids"):
        make_trainer(tmp_path, {**PAIRS, "step_map": steps}, make_model("Dream"), objective="trace")


def test_conversations_with_step_maps(tmp_path):
    chats = {
        "prompt": [[{"role": "user", "content": p}] for p in PAIRS["prompt"]],
        "completion": [[{"role": "assistant", "content": c}] for c in PAIRS["completion"]],
        "step_map": [list(range(len(c) + 1)) for c in PAIRS["completion"]],  # <eos> ends the turn
    }
    trainer = make_trainer(tmp_path, chats, make_model("llada"), objective="trace", max_steps=1)
    assert trainer.train_dataset[0]["step_map"] == [-1] * (len(PAIRS["prompt"][0]) + 3) + chats["step_map"][0]
    trainer.train()


def test_streamed_step_maps(tmp_path):
    rows = Dataset.from_dict(step_map_data())
    model, tokenizer = make_model("llada"), make_tokenizer()
    known = make_trainer(tmp_path, step_map_data(), model, objective="trace", max_steps=1)
    streamed = DiffusionSFTTrainer(
        model, args=known.args, train_dataset=rows.to_iterable_dataset(), processing_class=tokenizer
    )
    assert isinstance(streamed.train_dataset, IterableDataset)
    found = list(streamed.train_dataset)
    assert [row["step_map"] for row in found] == step_map_data()["step_map"]
    streamed.train()


def test_missing_step_maps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has no column `step_map`.*`objective='trace'`"):
        make_trainer(tmp_path, objective="trace")
    with pytest.raises(ValueError, match="`eval_dataset` has no column `step_map`"):
        make_trainer(tmp_path, step_map_data(), eval_data=PAIRS, objective="trace")
    with pytest.raises(ValueError, match="`packing_strategy='wrapped'` cuts responses"):
        make_trainer(tmp_path, step_map_data(), objective="trace", packing=True, packing_strategy="wrapped")


def test_objectives_of_the_other_attention_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`objective='block'` is for.*\['ar', 'random_mask', 'semi_ar', 'trace'\]"):
        make_trainer(tmp_path, model=make_model("llada"), objective="block")
    with pytest.raises(ValueError, match=r"`objective='random_mask'` is for.*\['ar', 'block', 'trace'\]"):
        make_trainer(tmp_path, objective="random_mask")
    with pytest.raises(ValueError, match="`objective='semi_ar'` needs `block_length`"):
        make_trainer(tmp_path, model=make_model("llada"), objective="semi_ar")


# --------------------------------------------------------------------------------------------------------------- gain


@FULL
def test_random_masking_halves_the_loss(tmp_path, family):
    letters = "abcdefgh"
    data = {
        "prompt": [f"{a}{b}:" for a in letters for b in letters],
        "completion": [f"{b}{a}{b}{a}" for a in letters for b in letters],
    }
    options = {"per_device_train_batch_size": 16, "max_steps": 150, "learning_rate": 5e-3, "eval_data": data}
    trainer = make_trainer(tmp_path, data, make_model(family, initializer_range=0.05), logging_steps=50, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


def test_the_state_of_a_config_is_plain(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model("llada"))
    assert json.loads(json.dumps(trainer.args.to_dict()))["objective"] is None
