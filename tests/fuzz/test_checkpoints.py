import shutil

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer, TraceRLConfig, TraceRLTrainer

from ..trainers.tiny_rl import ON_CPU, letter_reward, make_model, make_prompts, make_tokenizer
from .doors import judge, spoil


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["sdar", "Dream", "llada"])
def test_models(family, tmp_path):
    good = tmp_path / "good"
    make_model(family).save_pretrained(good)
    rows = []
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        for damage in ("cut", "empty", "binary", "text"):
            bad = tmp_path / f"{name}-{damage}"
            shutil.copytree(good, bad)
            spoil(bad / name, damage)
            rows.append(((name,), damage, lambda b=bad: AutoModelForCausalLM.from_pretrained(b)))
    judge(f"from_pretrained, {family}", rows)


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_runs(kind, tmp_path):
    """Whatever file of a checkpoint is broken or gone: a resume from that folder names it."""

    def trainer(steps):
        small = {**ON_CPU, "output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 1}
        small |= {"per_device_train_batch_size": 8, "max_steps": steps}
        shared = {"model": make_model(), "processing_class": make_tokenizer()}
        if kind == "sft":
            data = Dataset.from_dict({"prompt": ["ab"] * 16, "completion": ["cd"] * 16})
            return DiffusionSFTTrainer(args=DiffusionSFTConfig(**small), train_dataset=data, **shared)
        args = TraceRLConfig(num_generations=4, max_completion_length=6, **small)
        return TraceRLTrainer(reward_funcs=letter_reward, args=args, train_dataset=make_prompts(), **shared)

    trainer(1).train()
    good = tmp_path / "out" / "checkpoint-1"
    names = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
    rows = []
    for name in names + (["rollout_state_0.pt"] if kind == "rl" else []):
        for damage in ("cut", "empty", "binary", "missing"):
            if (name, damage) == ("rollout_state_0.pt", "missing"):
                continue  # between two generations the buffer is empty, and within one it is decoded again: tested
            bad = tmp_path / f"{name}-{damage}"
            shutil.copytree(good, bad)
            spoil(bad / name, damage)
            word = "model" if name == "model.safetensors" else name
            rows.append(((word,), damage, lambda b=bad: trainer(2).train(resume_from_checkpoint=str(b))))
    judge(f"resume, {kind}", rows)
