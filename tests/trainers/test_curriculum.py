"""Blocks that grow in the course of a run."""

import pytest
import torch

from dllm_trl import BlockSizeCurriculum

from .test_sft_trainer import PAIRS, assert_same, make_trainer, weights
from .tiny_rl import BLOCK, make_model


OPTIONS = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.1}


def test_shares_of_the_run():
    even = BlockSizeCurriculum([4, 8, 16])
    assert [even.block_length(step, 9) for step in range(9)] == [4] * 3 + [8] * 3 + [16] * 3
    assert [even.block_length(step, 4) for step in range(4)] == [4, 4, 8, 16]
    named = BlockSizeCurriculum({0: 2, 0.25: 4, 0.5: 32})
    assert [named.block_length(step, 8) for step in range(8)] == [2, 2, 4, 4, 32, 32, 32, 32]
    assert BlockSizeCurriculum([4]).block_length(0, 0) == 4


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "must name block lengths"),
        ([4, 0], "must name block lengths of 1 or more"),
        ([4, 8.0], "must name block lengths"),
        ([4, True], "must name block lengths"),
        ([8, 4], r"must grow, but are \[8, 4\]"),
        ([4, 4], "must grow"),
        ({0.1: 4, 0.5: 8}, "must start with 0"),
        ({0: 4, 1.0: 8}, "all below 1"),
        ({0: 4, 0.5: 8, 0.4: 16}, "must start with 0 and grow"),
    ],
)
def test_schedules_that_are_none(schedule, message):
    with pytest.raises(ValueError, match=message):
        BlockSizeCurriculum(schedule)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llada", {}, "`model` has full attention"),
        ("sdar", {"objective": "ar"}, "trained by blocks, but"),
        ("sdar", {"block_length": 8}, "`block_length=8` and a `BlockSizeCurriculum`"),
        ("sdar", {"callbacks": [BlockSizeCurriculum([4])] * 2}, "2 curricula"),
    ],
)
def test_refused_at_construction(tmp_path, family, options, message):
    options = {"callbacks": [BlockSizeCurriculum([4, 8])]} | options
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=make_model(family), **options)


@pytest.mark.parametrize("family", BLOCK)
def test_each_part_of_the_run_trains_its_blocks(tmp_path, monkeypatch, warnings_of, family):
    curriculum = BlockSizeCurriculum({0: 2, 0.4: 4, 0.7: 8})
    trainer = make_trainer(tmp_path, model=make_model(family), callbacks=[curriculum], eval_data=PAIRS, **OPTIONS)
    assert trainer.block_length == trainer.model.config.block_size == 2
    seen, rounds = [], trainer.objective.rounds
    monkeypatch.setattr(trainer.objective, "rounds", lambda rows: seen.append(rows.grid.block_length) or rounds(rows))
    trainer.train()
    assert seen == [log["block_length"] for log in trainer.state.log_history if "loss" in log] == [2, 2, 2, 4, 4, 8]
    assert trainer.evaluate()["eval_block_length"] == 8 and seen[6:] == [8] * (len(seen) - 6)
    trainer.save_model()
    assert not any("was trained with" in message for message in warnings_of())
    assert type(trainer.model).from_pretrained(tmp_path).config.block_size == 8


def test_one_block_length_is_the_configs(tmp_path):
    alone = make_trainer(tmp_path, callbacks=[BlockSizeCurriculum([8])], **OPTIONS)
    named = make_trainer(tmp_path, block_length=8, **OPTIONS)
    other = make_trainer(tmp_path, callbacks=[BlockSizeCurriculum([4, 8])], **OPTIONS)
    for trainer in (alone, named, other):
        trainer.train()
    assert_same(weights(alone), weights(named), atol=0)
    assert any(not torch.equal(weights(other)[name], value) for name, value in weights(named).items())


def test_a_callback_that_is_added_later_is_followed(tmp_path):
    trainer = make_trainer(tmp_path, **OPTIONS)
    trainer.add_callback(BlockSizeCurriculum([2, 8]))
    trainer.train()
    assert trainer.block_length == 8


@pytest.mark.parametrize("steps", [2, 3])
def test_resumed_runs_go_on_where_they_were(tmp_path, steps):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2}
    whole = make_trainer(tmp_path, callbacks=[BlockSizeCurriculum([2, 4, 8])], **options)
    whole.train()
    resumed = make_trainer(
        tmp_path / "other", model=make_model(seed=1), callbacks=[BlockSizeCurriculum([2, 4, 8])], **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    found, expected = ([log["block_length"] for log in t.state.log_history if "loss" in log] for t in (resumed, whole))
    assert found == expected == [2, 2, 4, 4, 8, 8]
