"""Models that FSDP2 or DeepSpeed shard over two processes, against the same runs in one process."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dllm_trl import TraceRLConfig, TraceRLTrainer
from dllm_trl.trainers.constructor_checks import check_sharding

from .test_distributed import HERE, history, launch
from .tiny_rl import make_model, make_tokenizer


RECIPES = HERE.parents[1] / "recipes" / "accelerate"
# A larger epsilon of Adam: weights whose gradient is nearly zero would else move by the sign of its rounding
COMMON = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "adam_epsilon": 1e-5}
slow = pytest.mark.slow
zero = [
    slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which is not installed"
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models: one that is made under ZeRO-3 draws other weights."""
    root = tmp_path_factory.mktemp("models")
    for family in ("sdar", "llada"):
        make_model(family).save_pretrained(root / family)
        make_tokenizer().save_pretrained(root / family)
    return root


def sharded(recipe: str) -> dict:
    return {"processes": 2, "config_file": RECIPES / f"{recipe}.yaml", "sharded": True}


def assert_same_run(one, two, names=("loss", "grad_norm")):
    for name in names:
        expected = history(one, name)
        assert len(expected) >= 2
        assert history(two, name) == pytest.approx(expected, abs=1e-5), name
    weights, others = ([load_file(file) for file in sorted(folder.glob("*.safetensors"))] for folder in (one, two))
    assert len(weights) == len(others) == 1
    assert weights[0].keys() == others[0].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(others[0][name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "family", "lora"),
    [
        pytest.param("fsdp2", "llada", False),
        *[pytest.param("fsdp2", *case, marks=slow) for case in (("sdar", False), ("sdar", True), ("llada", True))],
        *[pytest.param("zero2", *case, marks=zero) for case in (("sdar", False), ("llada", True))],
        *[pytest.param("zero3", family, lora, marks=zero) for family in ("sdar", "llada") for lora in (False, True)],
    ],
)
def test_sharded_rollouts_and_updates_equal_one_process(tmp_path, folders, recipe, family, lora):
    """Uneven prompts, processes that decode different numbers of forwards, and groups of one process that are dropped
    while those of the other are not."""
    options = {
        **COMMON,
        "model": str(folders / family),
        "lora": lora,
        "block_length": 4,
        "beta": 0.05,
        "kl_target": "old",
        "accuracy_range": [0.25, 0.5],
    }
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", gradient_accumulation_steps=2, **sharded(recipe), **options)
    assert_same_run(tmp_path / "one", tmp_path / "two", ("loss", "grad_norm", "reward", "frac_groups_dropped"))
    assert 0 < sum(history(tmp_path / "one", "frac_groups_dropped")) < 2
    if not lora:  # what was exported is a model, whole
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


@slow
@pytest.mark.parametrize("recipe", ["fsdp2", pytest.param("zero2", marks=zero), pytest.param("zero3", marks=zero)])
def test_a_sharded_run_that_is_killed_ends_with_the_same_weights(tmp_path, folders, recipe):
    """Killed in the middle of a rollout buffer."""
    options = {
        **COMMON,
        **sharded(recipe),
        "model": str(folders / "llada"),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
    }
    assert launch(tmp_path / "whole", **options) == 0
    assert launch(tmp_path / "killed", kill_at=2, **options, may_fail=True) != 0
    assert launch(tmp_path / "killed", resume=True, **options) == 0
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


@slow
@pytest.mark.parametrize("family, lora", [("sdar", True), ("llada", False)])
@pytest.mark.parametrize("recipe", ["fsdp2", pytest.param("zero2", marks=zero), pytest.param("zero3", marks=zero)])
def test_sharded_fine_tuning_equals_one_process(tmp_path, folders, recipe, family, lora):
    options = {**COMMON, "script": "run_sft.py", "model": str(folders / family), "lora": lora, "learning_rate": 1e-2}
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", gradient_accumulation_steps=2, **sharded(recipe), **options)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_reentrant_checkpointing_of_full_attention_in_two_processes(tmp_path):
    """What TRL sets for LoRA with ZeRO-3. Each layer is called once per chunk of rounds."""
    options = {**COMMON, "family": "llada", "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", processes=2, gradient_accumulation_steps=2, **options)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_ways_of_sharding_that_cannot_decode_are_refused(tmp_path):
    args = TraceRLConfig(str(tmp_path), use_cpu=True, bf16=False, ds3_gather_for_generation=False)
    with pytest.raises(ValueError, match="`ds3_gather_for_generation=False` is not supported by `TraceRLTrainer`"):
        TraceRLTrainer(make_model(), lambda completions, **kwargs: [0.0], args, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="Set `fsdp_version: 2`"):
        check_sharding("TraceRLTrainer", 1)
    check_sharding("TraceRLTrainer", 2)
    check_sharding("TraceRLTrainer", None)
