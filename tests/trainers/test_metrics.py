"""What is logged does not depend on how the data was cut: into batches, accumulation steps or processes."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_trl.trainers.advantages import Advantage
from dllm_trl.trainers.metrics import reduce_metric

from .run_metrics import evaluate, make_rl, make_sft, run_all, train
from .tiny_rl import TINY


def assert_close(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_how_values_become_one():
    nan = math.nan
    assert reduce_metric("entropy", [1.0, 3.0, nan, 9.0], [1.0, 3.0, 5.0, 0.0]) == pytest.approx(2.5)
    assert math.isnan(reduce_metric("entropy", [nan], [1.0])) and math.isnan(reduce_metric("reward_std", [1.0], [1.0]))
    assert reduce_metric("completions/min_length", [4.0, 2.0, nan], [1.0] * 3) == 2
    assert reduce_metric("clip_ratio/high_max", [0.1, 0.4], [5.0, 1.0]) == 0.4
    assert reduce_metric("rewards/r/std", [0.0, 1.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)
    assert reduce_metric("completions/mean_terminated_length", [nan], [1.0]) == 0


# ---------------------------------------------------------------------------------------------------------------- SFT

OBJECTIVES = [
    *[(family, {"loss_norm": norm}) for family in ("sdar", "llada") for norm in ("token", "sequence", "batch")],
    *[(family, {}) for family in TINY if family not in ("sdar", "llada")],
    ("sdar", {"objective": "trace"}),
    ("sdar", {"objective": "ar"}),
    ("sdar", {"noise_per": "sequence"}),
    ("sdar", {"loss_type": "dft"}),
    ("sdar", {"padding_free": True, "max_length": None}),
    ("sdar", {"packing": True, "max_length": 40}),
    ("llada", {"objective": "trace", "loss_norm": "sequence"}),
    ("llada", {"objective": "semi_ar", "block_length": 8, "loss_norm": "token"}),
    ("llada", {"weighting": "cart", "eos_fill_length": 50}),
    ("llada", {"weighting": "mean", "loss_norm": "batch"}),
    ("llada", {"weighting": "none"}),
]


@pytest.mark.parametrize(("family", "options"), OBJECTIVES, ids=str)
def test_sft_evaluation_has_one_value(tmp_path, family, options):
    trainer = make_sft(tmp_path, family, **options)
    whole = evaluate(trainer, 11)
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= whole.keys()
    for size in (1, 4):
        assert_close(evaluate(trainer, size), whole)


def test_sft_evaluation_leaves_the_load_balancing_loss_out(tmp_path):
    plain, balanced = (evaluate(make_sft(tmp_path, "sdar_moe", router_aux_loss_coef=c)) for c in (0.0, 0.5))
    assert balanced["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert balanced["eval_aux_loss"] > 0


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_sft_training_logs_one_value(tmp_path, family):
    *others, whole = (
        train(
            make_sft(
                tmp_path,
                family,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=6 // size,
                max_steps=4,
                noise_max=0.5,
            )
        )
        for size in (1, 2, 6)  # one row at a time: some have nothing masked
    )
    assert len(whole) == 3 and {"loss", "entropy", "mean_token_accuracy", "num_tokens"} <= whole[0].keys()
    for other in others:
        for found, wanted in zip(other, whole, strict=True):
            assert_close(found, wanted)


def test_a_prediction_leaves_nothing_in_the_next_evaluation(tmp_path):
    trainer = make_sft(tmp_path)
    expected = evaluate(trainer)
    trainer.predict(trainer.eval_dataset.select(range(3)))
    assert evaluate(trainer) == expected


# ----------------------------------------------------------------------------------------------------------------- RL

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
RL_CASES = [
    *[("sdar", {"loss_type": loss_type}) for loss_type in LOSSES],
    ("llada", {}),
    ("sdar", {"entropy_coef": 0.1, "loss_type": "grpo"}),
    ("sdar_moe", {"router_aux_loss_coef": 0.5, "loss_type": "grpo"}),
    ("sdar", {"importance_sampling_level": "sequence"}),
    ("llada", {"max_completion_length": 1, "block_length": 1}),
]


@pytest.mark.parametrize(("family", "options"), RL_CASES, ids=str)
def test_rl_evaluation_has_one_value(tmp_path, family, options):
    trainer = make_rl(tmp_path, family, **options)
    whole = evaluate(trainer, 14)
    assert {"eval_loss", "eval_reward", "eval_reward_std", "eval_kl", "eval_entropy"} <= whole.keys()
    assert {"eval_rewards/partial_reward/mean", "eval_completions/max_length"} <= whole.keys()
    assert whole["eval_kl"] > 0 and ("eval_policy_loss" in whole) == ("entropy_coef" in options)
    whole.pop("eval_aux_loss", None)  # not linear in what shares a batch
    for size in (2, 6):
        found = evaluate(trainer, size)
        found.pop("eval_aux_loss", None)
        assert_close(found, whole)


# `bnpo`, the entropy bonus and the load-balancing loss are means over a micro-batch: these train differently
@pytest.mark.parametrize("options", [{"loss_type": kind} for kind in ("grpo", "dapo", "vespo")], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rl_training_logs_one_value(tmp_path, options, level):
    other, whole = (
        train(
            make_rl(
                tmp_path,
                num_iterations=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                max_steps=4,
                importance_sampling_level=level,
                **options,
            )
        )
        for size in (1, 4)
    )
    assert len(whole) == 3 and {"loss", "kl", "entropy", "reward"} <= whole[0].keys()
    assert options["loss_type"] == "vespo" or whole[1]["clip_ratio/region_mean"] > 0
    for found, wanted in zip(other, whole, strict=True):
        assert_close(found, wanted)


# ---------------------------------------------------------------------------------------------------------- processes


def test_two_processes_log_what_one_does(tmp_path):
    """The last batches are filled up with rows from the beginning, which count once."""
    (tmp_path / "two").mkdir()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [*command, "tests.trainers.run_metrics", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one = run_all(tmp_path, steps=4)
    for name, wanted in one.items():
        pairs = zip(two[name], wanted, strict=True) if isinstance(wanted, list) else [(two[name], wanted)]
        for found, expected in pairs:
            assert_close(found, expected)


# ----------------------------------------------------------------------------------------------------------- messages


def test_right_answers_are_no_fault_of_the_rewards(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trainer = make_rl(tmp_path, overlong_slack=None)
    trainer._watch_signal(torch.ones(4, 2), Advantage(torch.zeros(4), torch.ones(4, dtype=torch.bool)))
    assert "All answers of this step are right" in caplog.text and "No group" not in caplog.text


def test_unknown_scale_of_rewards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`scale_rewards` must be one of .*'popluation'"):
        make_rl(tmp_path, scale_rewards="popluation")
