"""What a checkpoint leaves out, checkpoints that are not whole, and runs that are killed."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from . import test_sft_trainer, test_tracerl_trainer
from .tiny_rl import make_model, make_prompts


SAVING = {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
BUFFERED = {"steps_per_generation": 4, "gradient_accumulation_steps": 1}  # a buffer lasts four updates
KINDS = pytest.mark.parametrize("kind", ["sft", "rl"])


def make_trainer(kind, folder, model=None, **options):
    if kind == "sft":
        options = {"per_device_train_batch_size": 2, **options}
        return test_sft_trainer.make_trainer(folder, model=model or make_model(), **options)
    if kind != "rl":  # with an objective of this name
        options = {"objective": kind, "num_iterations": 2, **options}
    return test_tracerl_trainer.make_trainer(folder, model=model or make_model(), **{**BUFFERED, **options})


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def history(trainer, name):
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


@pytest.fixture(scope="module", params=["sft", "rl"])
def run(request, tmp_path_factory):
    """A finished run of either kind with three checkpoints: its kind, its folder, its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(request.param, folder, max_steps=3, **SAVING)
    trainer.train()
    return request.param, folder, weights(trainer)


def resume(run, folder, **options):
    kind, _, expected = run
    trainer = make_trainer(kind, folder, model=make_model(seed=1), max_steps=3, **SAVING, **options)
    trainer.train(resume_from_checkpoint=True)
    return same(weights(trainer), expected)


LOADED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("fault", ["missing", "empty", "cut off", "other bytes"])
@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_that_is_not_whole_is_named(run, tmp_path, name, fault, warnings_of):
    kind, source, _ = run
    shutil.copytree(source, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / name
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        broken = {"empty": b"", "cut off": content[: len(content) // 2], "other bytes": b"\x93" * len(content)}
        file.write_bytes(broken[fault])
    trainer = make_trainer(kind, tmp_path / "other", max_steps=3)
    with pytest.raises(ValueError, match=f"checkpoint-2 is not a whole checkpoint: `{name}`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    # The newest whole one is found, whatever lies beside it, and ends where the run ended that was not broken off
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-99").write_text("a file")
    (tmp_path / "run" / "checkpoint-abc").mkdir()
    (tmp_path / "run" / "checkpoint-²").mkdir()
    assert resume(run, tmp_path / "run")
    assert any("checkpoint-2 is incomplete" in message and name in message for message in warnings_of())
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


def test_no_whole_checkpoint_says_why(run, tmp_path):
    shutil.copytree(run[1] / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="No complete checkpoint found.*checkpoint-1.*`scheduler.pt` is missing"):
        resume(run, tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        make_trainer(run[0], tmp_path).train(resume_from_checkpoint=str(tmp_path / "nothing"))


def test_a_foreign_checkpoint_is_judged_by_what_it_must_have(run, tmp_path, warnings_of):
    """Without the list of its files, as TRL's trainers write them."""
    shutil.copytree(run[1] / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "run_state.json").unlink()
    assert resume(run, tmp_path)
    assert any("no `run_state.json`" in message for message in warnings_of())
    shutil.rmtree(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="`optimizer.pt` is missing"):
        resume(run, tmp_path)


def test_shards_of_the_weights_are_looked_at(run, tmp_path):
    kind, source, _ = run
    shutil.copytree(source / "checkpoint-2", tmp_path / "checkpoint-2")
    folder = tmp_path / "checkpoint-2"
    (folder / "run_state.json").unlink()
    (folder / "model.safetensors").unlink()
    make_model().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"`{shards[1].name}` is cut off or damaged"):
        make_trainer(kind, tmp_path / "other").train(resume_from_checkpoint=str(folder))


@KINDS
def test_weights_alone_cannot_be_resumed(tmp_path, kind):
    trainer = make_trainer(kind, tmp_path, max_steps=1, save_only_model=True, **SAVING)
    trainer.train()
    with pytest.raises(ValueError, match="`optimizer.pt` is missing.*save_only_model=True"):
        trainer.train(resume_from_checkpoint=True)


@KINDS
def test_adapters_resume(tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    options = {"max_steps": 3, **SAVING}
    straight = (
        make_trainer(kind, tmp_path / "a", peft_config=config, disable_dropout=False, **options)
        if kind == "rl"
        else make_trainer(kind, tmp_path / "a", peft_config=config, **options)
    )
    straight.train()
    other = make_trainer(kind, tmp_path / "b", peft_config=copy.deepcopy(config), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert same(weights(other), weights(straight))
    (tmp_path / "a" / "checkpoint-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="`adapter_model.safetensors` is missing"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


@KINDS
def test_a_second_run_in_one_folder(tmp_path, kind, warnings_of):
    """It is pointed out, and what is resumed is what was written last."""
    make_trainer(kind, tmp_path, max_steps=3, **SAVING).train()
    second = make_trainer(kind, tmp_path, max_steps=2, **SAVING, lr_scheduler_type="constant")
    second.train()
    assert any("holds checkpoints of an earlier run (checkpoint-1, checkpoint-2" in m for m in warnings_of())
    resumed = make_trainer(kind, tmp_path, max_steps=2, **SAVING, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(second)) and resumed.state.global_step == 2
    messages = warnings_of()
    assert any("checkpoint-2 was written last" in message and "checkpoint-3" in message for message in messages)
    assert any("is at step 2, and this run ends at step 2" in message for message in messages)


def test_a_folder_that_is_written_over_is_not_whole_meanwhile(tmp_path):
    make_trainer("sft", tmp_path, max_steps=1, **SAVING).train()
    trainer = make_trainer("sft", tmp_path, max_steps=1, **SAVING)

    def dies(*args):
        raise KeyboardInterrupt

    trainer._save_optimizer_and_scheduler = dies
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ValueError, match="No complete checkpoint"):
        make_trainer("sft", tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_token_counts_go_on(tmp_path):
    options = {"max_steps": 4, **SAVING}
    straight = make_trainer("sft", tmp_path / "a", **options)
    straight.train()
    resumed = make_trainer("sft", tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert history(resumed, "num_tokens") == history(straight, "num_tokens")


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_that_moves_is_resumed(tmp_path, tied):
    options = {"max_steps": 4, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, **SAVING}
    options |= {"ref_model_mixup_alpha": 0.5, "steps_per_generation": 1, "num_iterations": 2}
    straight = make_trainer("rl", tmp_path / "a", model=make_model(tie_word_embeddings=tied), **options)
    straight.train()
    resumed = make_trainer("rl", tmp_path / "b", model=make_model(tie_word_embeddings=tied), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert history(resumed, "kl") == history(straight, "kl")
    assert same(weights(resumed), weights(straight))
    assert same(dict(resumed.ref_model.named_parameters()), dict(straight.ref_model.named_parameters()))
    (tmp_path / "a" / "checkpoint-2" / "reference_model.pt").unlink()
    with pytest.raises(ValueError, match="`reference_model.pt` is missing"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_the_reference_is_the_policy_that_was_given(tmp_path, family):
    """Not what lies where its config says it came from; a new model came from nowhere."""
    make_model(family, seed=3).save_pretrained(tmp_path / "base")
    loaded = type(make_model(family)).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.5)
    for model in (loaded, make_model(family)):
        trainer = make_trainer("rl", tmp_path, model=model, beta=0.1, max_steps=1, on_policy_check="off")
        assert not any(p is q for p, q in zip(trainer.model.parameters(), trainer.ref_model.parameters()))
        assert same(dict(trainer.ref_model.named_parameters()), weights(trainer))
        assert not trainer.ref_model.training
        before = weights(trainer)
        trainer.train()
        assert history(trainer, "kl")[1] == pytest.approx(0, abs=1e-6)
        assert same(dict(trainer.ref_model.named_parameters()), before) and not same(weights(trainer), before)


class Draws(TrainerCallback):
    """Draws random numbers of all kinds, as a callback that decodes does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        torch.rand(7)
        model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, do_sample=True)
        model.train()


@KINDS
@pytest.mark.parametrize("disturbance", ["evaluation", "callback"])
def test_nothing_beside_training_changes_what_it_draws(tmp_path, kind, disturbance):
    """Dropout is on; in RL a rollout is shuffled over four updates."""
    options = {"max_steps": 6, "gradient_checkpointing": False}
    options |= {"on_policy_check": "off"} if kind == "rl" else {}
    disturbed = dict(options)
    if disturbance == "callback":
        disturbed["callbacks"] = [Draws()]
    else:
        disturbed |= {"eval_strategy": "steps", "eval_steps": 1}
        if kind == "rl":
            disturbed |= {"eval_dataset": make_prompts(4), "per_device_eval_batch_size": 4}
        else:
            disturbed |= {"eval_data": test_sft_trainer.PAIRS}
    plain, other = [
        make_trainer(kind, tmp_path / name, model=make_model(attention_dropout=0.2), **values)
        for name, values in (("plain", options), ("other", disturbed))
    ]
    plain.train()
    other.train()
    assert same(weights(other), weights(plain))


@pytest.fixture(scope="module")
def buffered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buffered")
    trainer = make_trainer("rl", folder, max_steps=6, **SAVING)
    trainer.train()
    return folder / "checkpoint-2", weights(trainer)


@pytest.mark.parametrize(
    "change",
    [
        {"block_length": 2},
        {"temperature": 0.7},
        {"top_k": 3},
        {"num_generations": 2},
        {"num_iterations": 2},
        {"max_completion_length": 7},
        {"denoising_steps": 1},
        {"remasking_strategy": "low_confidence_dynamic"},
        {"shrink": 2},
        {"seed": 1},
        {"steps_per_generation": 2},
        {"gradient_accumulation_steps": 2},
        {"scale_rewards": "none"},
        {"generation_kwargs": {"suppress_tokens": [9]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_buffer_made_with_other_settings_is_not_trained(tmp_path, buffered, change, warnings_of):
    checkpoint, _ = buffered
    trainer = make_trainer("rl", tmp_path, max_steps=4, on_policy_check="off", **change)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    name = next(iter(next(iter(change.values())))) if "generation_kwargs" in change else next(iter(change))
    said = [message for message in warnings_of() if "decoded again" in message]
    assert trainer.state.global_step == 4 and len(said) == 1 and f"{name}: " in said[0]


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-2}, {"logging_steps": 2}, {"num_slots": 3}, {"save_steps": 2}]
)
def test_a_buffer_is_kept_whatever_it_does_not_depend_on(tmp_path, buffered, change, warnings_of):
    checkpoint, expected = buffered
    trainer = make_trainer("rl", tmp_path, max_steps=6, **change)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(trainer), expected)
    assert not any("decoded again" in message for message in warnings_of())


def test_a_buffer_for_other_prompts_is_not_trained(tmp_path, buffered, warnings_of):
    prompts = Dataset.from_dict({"prompt": [f"{i}-{i}=" for i in range(17)]})
    trainer = make_trainer("rl", tmp_path, max_steps=4, dataset=prompts)
    trainer.train(resume_from_checkpoint=str(buffered[0]))
    assert any("answers other prompts" in message for message in warnings_of())


def test_too_few_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has 3 prompts, but one generation batch takes 4"):
        make_trainer("rl", tmp_path, dataset=make_prompts(3))
    rows = make_prompts(3).to_iterable_dataset()
    with pytest.raises(ValueError, match="Not one step was taken"):
        make_trainer("rl", tmp_path, dataset=rows, max_steps=2).train()
    with pytest.raises(ValueError, match="Not one step was taken"):
        make_trainer("sft", tmp_path, per_device_train_batch_size=16, dataloader_drop_last=True, max_steps=2).train()


def test_completions_of_training_and_evaluation(tmp_path):
    import pandas as pd

    evaluation = {"first": make_prompts(2), "second": Dataset.from_dict({"prompt": ["a", "b"]})}
    options = {"log_completions": True, "num_completions_to_print": 0, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"per_device_eval_batch_size": 4, "eval_dataset": evaluation}
    trainer = make_trainer("rl", tmp_path, max_steps=2, **options)
    trainer.train()
    tables = {file.stem: pd.read_parquet(file) for file in (tmp_path / "completions").iterdir()}
    names = {f"{kind}_{step:05d}" for kind in ("completions", "eval_first", "eval_second") for step in (1, 2)}
    assert set(tables) == names
    assert set(tables["eval_second_00002"]["prompt"]) == {"a", "b"}
    assert set(tables["eval_first_00002"]["prompt"]) == set(make_prompts(2)["prompt"])
    assert tables["completions_00001"]["completion"].tolist() == tables["completions_00002"]["completion"].tolist()
