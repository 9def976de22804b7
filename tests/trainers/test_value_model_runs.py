"""The value model in processes of their own: killed while it learns, and two processes against one."""

import pytest
import torch
from safetensors.torch import load_file

from .test_distributed import history, launch


CRITICS = pytest.mark.parametrize("value_model", ["copy", "adapter"])
VALUE = {"value_learning_rate": 1e-2, "block_length": 4, "gamma": 0.9, "gae_lambda": 0.8}


def both_models(folder):
    return {
        f"{name}/{key}": value
        for name in (".", "value_model")
        for key, value in load_file(folder / name / "model.safetensors").items()
    }


@pytest.mark.slow
@CRITICS
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_killed_in_value_training_and_resumed(tmp_path, family, value_model):
    """Both models end bit for bit as without the kill, whose update (the 5th, of rollout 3) is made again."""
    options = {
        **VALUE,
        "value_model": value_model,
        "family": family,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "value_lr_scheduler_type": "linear",
        "max_steps": 8,
        "save_steps": 1,
        "save_total_limit": 3,
    }
    launch(tmp_path / "whole", **options)
    assert launch(tmp_path / "killed", kill_in_update=5, **options) != 0
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))[-1] == "checkpoint-4"
    launch(tmp_path / "killed", resume=True, **options)
    whole, killed = both_models(tmp_path / "whole"), both_models(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    for name in ("value/loss", "value/explained_variance", "value/learning_rate", "reward", "loss"):
        assert history(tmp_path / "killed", name) == history(tmp_path / "whole", name)


@pytest.mark.slow
@CRITICS
@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("norm", ["token", "masked"])
def test_two_processes_equal_one_with_accumulation(tmp_path, family, value_model, norm):
    options = {
        **VALUE,
        "value_model": value_model,
        "value_loss_norm": norm,
        "value_epochs": 2,
        "family": family,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "accuracy_range": [0.25, 0.5],
        "save_strategy": "no",
    }
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", processes=2, gradient_accumulation_steps=2, **options)
    names = ["reward", "loss", "grad_norm", "value/loss", "value/explained_variance"]
    for name in [*names, "value/advantage_variance", "value/advantage_variance_without"]:
        one = history(tmp_path / "one", name)
        assert len(one) > 1 and history(tmp_path / "two", name) == pytest.approx(one, abs=1e-5)
    one, two = both_models(tmp_path / "one"), both_models(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=5e-5, rtol=0)
