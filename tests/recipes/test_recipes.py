"""The recipes end to end, very small, and every configuration file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import _demo
import pytest
import sft_math
import tracerl_math
import yaml
from _math_data import make_parser
from _word_problems import make_model, make_problems, make_tokenizer
from random_model import make_random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config

import dllm_trl
from dllm_trl import DiffusionSFTConfig, TraceRLConfig


RECIPES = Path(__file__).parents[2] / "recipes"
CPU = ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false"]


def run(script: str, *args: str) -> str:
    """Runs a recipe as a user does, in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(RECIPES / script), *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(dllm_trl.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A random model and its tokenizer in a folder."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def problems_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    problems = make_problems("validation", 8)
    rows = zip(problems["prompt"], problems["completion"], problems["answer"])
    path.write_text(
        "\n".join(
            json.dumps({"problem": prompt[0]["content"], "solution": done[0]["content"], "answer": answer})
            for prompt, done, answer in rows
        )
    )
    return path


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("configs/*/math*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_configs_parse(path):
    """On a machine without accelerator `bf16` is refused, so that is overridden, and nothing else."""
    config_class = DiffusionSFTConfig if path.stem.endswith("sft") else TraceRLConfig
    math_args, training_args, model_args = make_parser(config_class).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "--bf16", "false"]
    )
    assert math_args.dataset_name and model_args.model_name_or_path
    values = yaml.safe_load(path.read_text())
    for args in (math_args, training_args, model_args):
        for name in values.keys() & vars(args).keys() - {"bf16", "report_to"}:
            assert getattr(args, name) == values.pop(name), name
    assert set(values) == {"bf16", "report_to"} and training_args.report_to == []


@pytest.mark.parametrize("path", sorted(RECIPES.glob("configs/*/math.yaml")), ids=lambda p: p.parent.name)
def test_configs_are_the_papers(path):
    (_, args, _) = make_parser(TraceRLConfig).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "--bf16", "false"]
    )
    assert (args.epsilon, args.beta, args.kl_target) == (0.2, 0.01, "old")
    assert (args.learning_rate, str(args.lr_scheduler_type.value), args.max_grad_norm) == (1e-6, "constant", 1.0)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.999)
    assert args.num_generations == 16 and args.generation_batch_size == 64 * 16
    assert (args.temperature, args.top_k, args.block_length, args.shrink) == (1.0, 0, 4, 1)
    assert (args.max_completion_length, args.confidence_threshold) == (2000, 0.9)
    assert (args.overlong_slack, args.accuracy_range, args.scale_rewards) == (5, [0.2, 0.8], "population")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda p: p.stem)
def test_accelerate_configs_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.num_machines == 1


def test_lora_options():
    _, _, model_args = make_parser(TraceRLConfig).parse_args_and_config(
        ["--use_peft", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "--output_dir", "x", *CPU]
    )
    peft_config = get_peft_config(model_args)
    assert peft_config.r == 8 and peft_config.target_modules == {"q_proj", "v_proj"}


def test_demo_leaves_its_artefacts(tmp_path):
    output = run(
        "tracerl_math.py",
        *("--sft_steps", "3", "--max_steps", "2", "--sft_problems", "64", "--rl_problems", "16"),
        *("--eval_problems", "12", "--seed", "3", "--output_dir", str(tmp_path)),
    )
    assert "after SFT" in output and "after TraceRL" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_problems"] == 12 and summary["seed"] == 3 and summary["rl_steps"] == 2
    for name in ("accuracy_sft", "accuracy_rl"):
        assert 0 <= summary[name] <= 1
    assert summary["tokens_per_forward"] >= 1
    assert summary["seconds_sft"] > 0 and summary["seconds_rl"] > 0
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "trace.html").read_text()
    for problem in make_problems("heldout", 8):
        assert problem["prompt"][0]["content"] in page

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer.apply_chat_template(
        make_problems("heldout", 1)[0]["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs)
    assert ids.size(1) > inputs["input_ids"].size(1)
    assert model.generation_config.confidence_threshold == 0.9 and model.generation_config.max_new_tokens == 40


@pytest.mark.parametrize("peft", [False, True])
def test_tracerl_on_a_file(tmp_path, tiny_model, problems_file, peft, caplog):
    args = [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", str(problems_file), "--instruction", ""),
        *("--reward_funcs", "math", "format", "--max_steps", "2", "--num_generations", "4"),
        *("--per_device_train_batch_size", "8", "--max_completion_length", "8", "--logging_steps", "1"),
        *("--report_to", "none", "--output_dir", str(tmp_path), *CPU, *(["--use_peft"] if peft else [])),
    ]
    tracerl_math.main(*make_parser(TraceRLConfig).parse_args_and_config(args))
    logs = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all({"rewards/math_reward/mean", "rewards/format_reward/mean"} <= log.keys() for log in logs[:2])
    assert "No group has any reward signal" in caplog.text  # a random model's answers are all wrong
    assert (tmp_path / ("adapter_model.safetensors" if peft else "model.safetensors")).is_file()


def test_sft_on_a_file(tmp_path, tiny_model, problems_file):
    args = [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", str(problems_file), "--instruction", ""),
        *("--max_length", "64", "--max_steps", "2", "--report_to", "none", "--output_dir", str(tmp_path), *CPU),
    ]
    sft_math.main(*make_parser(DiffusionSFTConfig).parse_args_and_config(args))
    assert (tmp_path / "model.safetensors").is_file()


def test_sft_default(tmp_path, capsys):
    _demo.sft_main(["--max_steps", "2", "--sft_problems", "64", "--eval_problems", "6", "--output_dir", str(tmp_path)])
    assert "Right answers on 6 held-out problems" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "sdar"


def test_random_model(tmp_path, tiny_model):
    make_random_model(str(tiny_model), str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(tmp_path).mask_token_id
