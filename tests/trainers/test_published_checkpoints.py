"""A checkpoint of every family is loaded again, whatever its published names are."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_trl.trainers import DiffusionSFTConfig, DiffusionSFTTrainer

from .test_tracerl_trainer import make_trainer, weights
from .tiny_rl import TINY, make_model, make_prompts, make_tokenizer


def make_sft(tmp_path, family, seed=0, **options):
    args = DiffusionSFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, learning_rate=1e-2, max_length=24, **options
    )
    data = make_prompts().rename_column("answer", "completion")
    tokenizer = make_tokenizer()
    return DiffusionSFTTrainer(
        make_model(family, seed=seed), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )


def make_rl(tmp_path, family, seed=0, **options):
    return make_trainer(tmp_path, make_model(family, seed=seed), block_length=4, **options)


@pytest.mark.parametrize("make", [make_rl, make_sft])
@pytest.mark.parametrize("family", TINY)
def test_resumed_weights(tmp_path, family, make):
    trained = make(tmp_path, family, max_steps=1, save_strategy="steps", save_steps=1)
    trained.train()
    other = make(tmp_path, family, seed=1, max_steps=1, save_strategy="no")
    other._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for name, value in weights(other.model).items():
        assert torch.equal(value, trained.model.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llada", "sdar_moe"])
def test_best_model_at_the_end(tmp_path, family):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_sft(tmp_path, family, load_best_model_at_end=True, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    other = make_model(family, seed=1)
    other.load_state_dict(type(other).from_pretrained(best).state_dict())
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, other.get_parameter(name)), name


def test_a_name_that_is_missing_is_noticed(tmp_path):
    trainer = make_rl(tmp_path, "llada", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.transformer.ln_f.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    other = make_rl(tmp_path, "llada", max_steps=1, save_strategy="no")
    with pytest.raises(ValueError, match="model.norm.weight"):
        other._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
