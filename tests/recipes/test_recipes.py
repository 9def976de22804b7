"""The recipes end to end, very small, and every configuration file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import _demo
import _objectives
import _rewards
import pytest
import sft_math
import tracerl_math
import yaml
from _data import make_parser
from _objectives import TRAINERS, find_objective, trainer_of
from _word_problems import make_model, make_problems, make_tokenizer
from random_model import make_random_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser, get_peft_config

import dllm_trl
from dllm_trl import (
    CoupledGRPOConfig,
    DiffusionGenerationConfig,
    DiffusionGRPOConfig,
    DiffusionSFTConfig,
    RandomMaskGRPOConfig,
    TraceRLConfig,
)
from dllm_trl.modeling import FAMILIES
from dllm_trl.objectives import OBJECTIVES, SFT_OBJECTIVES

from ..rewards.test_process import Server, completion, send
from ..trainers.tiny_rl import ON_CPU
from ..trainers.tiny_rl import make_model as make_tiny_model
from ..trainers.tiny_rl import make_tokenizer as make_tiny_tokenizer


RECIPES = Path(__file__).parents[2] / "recipes"
CPU = ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false"]


def run(script: str, *args: str, cwd: Path | None = None) -> str:
    """Runs a recipe as a user does, in a process of its own. Returns all that it printed."""
    result = start(script, *args, cwd=cwd)
    return result.stdout + result.stderr


def start(script: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, str(RECIPES / script), *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(dllm_trl.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


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


PUBLISHED = sorted(path for path in RECIPES.glob("configs/*/*.yaml") if path.parent.name != "tiny")
FAMILY = {  # what the names of the folders stand for
    "sdar-1.7b": ("sdar", "JetLM/SDAR-1.7B-Chat"),
    "sdar-4b": ("sdar", "JetLM/SDAR-4B-Chat"),
    "trado-4b": ("sdar", "Gen-Verse/TraDo-4B-Instruct"),
    "trado-8b": ("sdar", "Gen-Verse/TraDo-8B-Instruct"),
    "trado-8b-thinking": ("sdar", "Gen-Verse/TraDo-8B-Thinking"),
    "llada-8b": ("llada", "GSAI-ML/LLaDA-8B-Instruct"),
    "mmada-8b": ("mmada", "Gen-Verse/MMaDA-8B-MixCoT"),
    "dream-7b": ("Dream", "Dream-org/Dream-v0-Instruct-7B"),
    "diffucoder-7b": ("Dream", "apple/DiffuCoder-7B-Instruct"),
}
POSITIONS = {"sdar": 32768, "llada": 4096, "mmada": 4096, "Dream": 131072}  # of the published models


def configs(*patterns: str) -> pytest.MarkDecorator:
    paths = [path for path in PUBLISHED if any(map(path.match, patterns))]
    return pytest.mark.parametrize("path", paths, ids=[f"{path.parent.name}/{path.stem}" for path in paths])


def parse(path: Path):
    """On a machine without accelerator `bf16` is refused, so that is overridden, and nothing else."""
    return make_parser(config_class_of(path)).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "--bf16", "false"]
    )


def config_class_of(path: Path) -> type:
    return DiffusionSFTConfig if path.stem.endswith("sft") else find_objective(["--config", str(path)])[1]


def attention(path: Path) -> str:
    return AutoConfig.for_model(FAMILY[path.parent.name][0]).diffusion_attention


def test_every_model_has_every_task():
    names = ("llada-8b", "dream-7b", "diffucoder-7b", "mmada-8b", "sdar-4b", "trado-8b", "trado-8b-thinking")
    tasks = ("math.yaml", "math_sft.yaml", "code_sft.yaml")
    assert {RECIPES / "configs" / name / task for name in names for task in tasks} <= set(PUBLISHED)


@configs("*.yaml")
def test_configs_parse(path):
    parsed = parse(path)
    values = yaml.safe_load(path.read_text())
    for args in parsed:
        for name in values.keys() & vars(args).keys() - {"bf16", "report_to"}:
            assert getattr(args, name) == values.pop(name), name
    assert set(values) == {"bf16", "report_to"} and parsed[1].report_to == []


@configs("*.yaml")
def test_configs_name_their_model_and_data(path):
    data_args, training_args, model_args = parse(path)
    family, model = FAMILY[path.parent.name]
    assert model_args.model_name_or_path == model and family in FAMILIES
    assert data_args.dataset_name
    assert training_args.output_dir == f"runs/{path.parent.name}-{path.stem.replace('_', '-')}"
    if data_args.chat_template is not None:
        assert (RECIPES.parent / data_args.chat_template).is_file()
    assert (data_args.chat_template is not None) == (family == "mmada")
    assert (data_args.generation_prompt == "<|im_start|>assistant<think>\n") == path.parent.name.endswith("thinking")


@configs("*_sft.yaml")
def test_sft_configs_are_the_references(path):
    _, args, _ = parse(path)
    assert attention(path) in SFT_OBJECTIVES[args.objective].attentions
    expected = {"sdar": "block", "llada": "random_mask", "mmada": "random_mask", "Dream": "semi_ar"}
    assert args.objective == expected[FAMILY[path.parent.name][0]]
    assert args.block_length == {"block": 4, "random_mask": None, "semi_ar": 16}[args.objective]
    if args.objective == "random_mask":
        assert (args.weighting, args.noise_eps, args.noise_max) == ("mean", 0.1, 0.9)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert args.learning_rate == 1e-5 and args.num_train_epochs == 1
    assert args.max_length <= POSITIONS[FAMILY[path.parent.name][0]]


@configs("math.yaml", "process_reward.yaml", "*_sft.yaml")
def test_optimizer_is_the_references(path):
    _, args, _ = parse(path)
    assert (args.optim.value, args.adam_beta1, args.adam_beta2, args.weight_decay) == ("adamw_torch", 0.9, 0.999, 0)
    assert (args.lr_scheduler_type.value, args.max_grad_norm) == ("constant", 1.0)
    assert not args.warmup_steps


@configs("math.yaml", "value.yaml")
def test_rl_configs_are_the_papers(path):
    data_args, args, _ = parse(path)
    # Whole groups, also when 8 processes share the batch, as the accelerate configurations do
    assert args.generation_batch_size % (8 * args.per_device_train_batch_size) == 0
    assert data_args.reward_funcs == ["math"]
    assert (args.epsilon, args.beta, args.kl_target, args.num_iterations) == (0.2, 0.01, "old", 1)
    assert args.learning_rate == 1e-6
    assert (args.overlong_slack, args.accuracy_range, args.scale_rewards) == (5, [0.2, 0.8], "population")
    family, thinking = FAMILY[path.parent.name][0], path.parent.name.endswith("thinking")
    length = data_args.max_prompt_length + args.max_completion_length
    assert length <= POSITIONS[family]
    if attention(path) == "block":
        assert args.num_generations == 16 and args.generation_batch_size == 64 * 16
        assert (args.temperature, args.top_k, args.top_p, args.shrink) == (1.0, 0, 1.0, 1)
        assert (args.block_length, args.denoising_steps) == (4, 4)
        assert (args.remasking_strategy, args.confidence_threshold) == ("low_confidence_dynamic", 0.9)
        assert (data_args.max_prompt_length, args.max_completion_length) == (784, 10000 if thinking else 2000)
        assert args.cache is None and not args.generation_kwargs
    else:
        assert args.num_generations == 8 and args.generation_batch_size == 32 * 8
        assert (args.temperature, args.shrink, args.block_length) == (0.8, 8, 32)
        assert (args.top_p, args.top_k) == ((0.9, 50) if family == "Dream" else (1.0, 0))
        assert args.max_completion_length == (1024 if family == "Dream" else 512)
        assert args.denoising_steps == 32
        assert args.remasking_strategy == "low_confidence_static" and data_args.max_prompt_length == 512
        generation = DiffusionGenerationConfig(cache=args.cache, **args.generation_kwargs)
        assert generation.refresh_interval == (32 if family == "Dream" else 128)


AUTHORS = {  # of a method: what is not TRL's default, and how many responses a rollout has
    "coupled": (
        {"objective": "coupled", "estimate": "diffucoder", "lower": 0.2, "upper": 0.8, "max_completion_length": 256}
        | {"scale_rewards": "leave_one_out", "epsilon": 0.5, "beta": 0.01, "num_generations": 10, "num_iterations": 2}
        | {"learning_rate": 1e-6, "adam_beta2": 0.99, "weight_decay": 0.1, "max_grad_norm": 0.2, "top_p": 0.95}
        | {"sync_ref_model": True, "ref_model_sync_steps": 64, "remasking_strategy": "entropy", "temperature": 1.0},
        80,
    ),
    "d1": (
        {"objective": "diffu_grpo", "prompt_mask_prob": 0.15, "scale_rewards": "none", "epsilon": 0.5, "beta": 0.04}
        | {"num_generations": 6, "num_iterations": 12, "learning_rate": 3e-6, "adam_beta2": 0.99, "weight_decay": 0.1}
        | {"max_grad_norm": 0.2, "max_completion_length": 256, "block_length": 32, "denoising_steps": 16}
        | {"temperature": 0.9},
        96,
    ),
    "unigrpo": (
        {"objective": "random_mask", "ratios": "spaced", "lower": 0.1, "upper": 0.9, "num_iterations": 2}
        | {"scale_rewards": "population", "epsilon": 0.2, "beta": 0.01, "kl_target": "old", "learning_rate": 1e-6}
        | {"num_generations": 8, "max_completion_length": 512},
        256,
    ),
}


@configs(*(f"{name}.yaml" for name in AUTHORS))
def test_methods_of_others_are_their_authors(path):
    data_args, args, model_args = parse(path)
    expected, responses = AUTHORS[path.stem]
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.generation_batch_size == responses and responses % (8 * args.per_device_train_batch_size) == 0
    assert args.num_generations * 8 <= responses and args.loss_type == "dapo" and not args.use_bias_correction_kl
    assert data_args.reward_funcs[0] == "math"
    assert (model_args.use_peft, model_args.load_in_4bit) == ((path.stem == "d1"),) * 2
    if model_args.use_peft:
        assert (model_args.lora_r, model_args.lora_alpha, len(model_args.lora_target_modules)) == (128, 64, 7)
    assert trainer_of(args).config_class is type(args) is not TraceRLConfig


SMALL = {  # what a tiny model on one core needs of a configuration for eight GPUs, and nothing else
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "bf16": "false",
    "logging_steps": 1,
    "save_steps": 1,
}


def run_small(path: Path, tmp_path: Path, monkeypatch, main, config_class, data: list[dict], **more) -> dict:
    """One step of a configuration with a tiny model of its family. Returns the log."""
    monkeypatch.chdir(RECIPES.parent)
    family, _ = FAMILY[path.parent.name]
    model = make_tiny_model(family, max_position_embeddings=20_000)
    model.generation_config.eos_token_id = list(range(6, 32))  # letters, so that every response ends
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    names = {"model_name_or_path": tmp_path, "dataset_name": tmp_path / "data.jsonl", "output_dir": tmp_path / "out"}
    options = [f"--{name}={value}" for name, value in {**SMALL, **names, **more}.items()]
    args = ["--config", str(path), "--use_cpu", *options, "--dtype", "float32"]
    if "sft" in path.stem and path.parent.name.endswith("thinking"):
        args += ["--eos_token", "<eos>"]  # the tiny tokenizer has no other
    main(*make_parser(config_class).parse_args_and_config(args))
    return json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]


@configs("*_sft.yaml")
def test_sft_configs_train(path, tmp_path, monkeypatch):
    data = yaml.safe_load(path.read_text())
    if "generation_prompt" in data:
        answer = {"role": "assistant", "content": "<think>\n7 + 1\n</think>\n8"}
        row = {"messages": [{"role": "user", "content": "Which?"}, answer]}
    else:
        row = {"problem": "1+1?", "solution": "```python\nprint(2)\n```"}
    log = run_small(path, tmp_path, monkeypatch, sft_math.main, DiffusionSFTConfig, [row] * 4)
    assert log["loss"] > 0


@configs("math.yaml", "value.yaml", *(f"{name}.yaml" for name in AUTHORS))
def test_rl_configs_train(path, tmp_path, monkeypatch):
    """The rewards differ within a group: something is learnt."""

    def reward(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    monkeypatch.setitem(_rewards.REWARDS, "math", reward)
    data = [{"problem": "1+1?", "answer": "2"}] * 4
    small = {"num_generations": 4, "max_completion_length": 64, "overlong_slack": 0, "load_in_4bit": "false"}
    log = run_small(path, tmp_path, monkeypatch, tracerl_math.main, config_class_of(path), data, **small)
    assert 0 < log["rewards/reward/mean"] < 1 and log["grad_norm"] > 0


def test_the_value_model_is_the_papers():
    _, args, _ = parse(RECIPES / "configs" / "sdar-4b" / "value.yaml")
    assert (args.value_model, args.value_learning_rate, args.value_lr_scheduler_type) == ("copy", 5e-6, "constant")
    assert (args.gamma, args.gae_lambda, args.value_clip, args.value_loss_norm) == (1.0, 1.0, 0.2, "token")
    assert (args.value_epochs, args.value_update_every, args.value_warmup_updates) == (1, 1, 0)


@configs("process_reward.yaml")
def test_process_rewards_are_the_papers_and_train(path, tmp_path, monkeypatch):
    """The judge is the one of the recipe, behind a server, which finds about half of the responses wrong."""
    data_args, args, _ = parse(path)
    assert (data_args.reward_funcs, args.reward_weights) == (["math", "process_judge.process"], [0.0, 1.0])
    assert (args.reward_chunk_length, args.gamma, args.gae_lambda, args.value_learning_rate) == (200, 0.99, 1.0, 5e-6)
    assert (args.generation_batch_size, args.num_generations, args.overlong_slack) == (512, 16, 5)

    def behave(number, body, handler):
        question = body["messages"][0]["content"]
        assert body["model"] == "judge" and "Which" in question
        send(handler, completion(rf"\boxed{{{1 - sum(question.encode()) % 2 * 2}}}"))

    server = Server(behave)
    names = {"JUDGE_URL": server.url, "JUDGE_MODEL": "judge", "JUDGE_CACHE": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "process_judge", raising=False)
    data = [{"problem": "Which?", "answer": "2"}] * 4
    small = {"num_generations": 4, "max_completion_length": 64, "overlong_slack": 0, "reward_chunk_length": 200}
    half_right = lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))]  # noqa: E731
    monkeypatch.setitem(_rewards.REWARDS, "math", half_right)
    try:
        log = run_small(path, tmp_path, monkeypatch, tracerl_math.main, TraceRLConfig, data, **small)
    finally:
        server.close()
    assert log["rewards/process_reward/std"] > 0 and log["grad_norm"] > 0 and len(server.requests) % 3 == 0
    assert log["reward"] == log["rewards/process_reward/mean"]  # the other one has no weight
    monkeypatch.delenv("JUDGE_URL")
    monkeypatch.delitem(sys.modules, "process_judge")
    with pytest.raises(ValueError, match="the environment variable `JUDGE_URL` does not say which"):
        _rewards.find_rewards(["process_judge.process"])


OWN_REWARD = """
def digits(completions, digit, **kwargs):
    return [float(text.count(str(d))) for text, d in zip(completions, digit)]

constant = 1
"""


def test_rewards_are_found(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN_REWARD)
    (tmp_path / "own_broken.py").write_text("import no_such_module_at_all")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    names = [
        "format",
        "math",
        "own_rewards.digits",
        "trl.rewards.think_format_reward",
        "owner/model-1.0",
        "folder",
    ]
    found = _rewards.find_rewards(names)
    functions = ["format_reward", "math_reward", "digits", "think_format_reward"]
    assert [function.__name__ for function in found[:4]] == functions and found[4:] == names[4:]
    assert str(tmp_path) not in sys.path
    for name, message in {
        "mth": "'mth', which is neither",
        "code": "'code', which is neither",
        "own_rewards.letters": "no function 'letters'",
        "own_rewards.constant": "no function 'constant'",
        "no_such_module.letters": "no module 'no_such_module'",
        "own_rewards.more.letters": "no module 'own_rewards.more'",
    }.items():
        with pytest.raises(ValueError, match=f"`reward_funcs` has '{name}', .*{message}|`reward_funcs` has {message}"):
            _rewards.find_rewards(["math", name])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        _rewards.find_rewards(["own_broken.reward"])


def test_a_reward_of_ones_own_and_a_reward_model_judge_their_own_columns(tmp_path, tiny_model):
    """As a user starts it: without an answer in the data, interrupted, and resumed by the word `True`."""
    (tmp_path / "own_rewards.py").write_text(OWN_REWARD)
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"prompt": "Leo has", "digit": 1})] * 8))
    tokenizer = make_tokenizer()
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    judge = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **config, num_labels=1))
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    args = [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", "data.jsonl", "--num_generations", "4"),
        *("--reward_funcs", "own_rewards.digits", "./judge", "--per_device_train_batch_size", "8"),
        *("--max_completion_length", "8", "--logging_steps", "1", "--save_steps", "1", "--report_to", "none"),
        *("--output_dir", "out", "--use_cpu", "--gradient_checkpointing", "false"),
    ]
    run("tracerl_math.py", *args, "--max_steps", "1", cwd=tmp_path)
    output = run("tracerl_math.py", *args, "--max_steps", "2", "--resume_from_checkpoint", "True", cwd=tmp_path)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"]][:2] == [1, 2]  # the first one is that of the first run
    assert {"rewards/digits/mean", "rewards/judge/mean"} <= state["log_history"][1].keys()
    assert "rewards/judge/mean" in output


def test_the_math_reward_says_that_answers_are_missing(tmp_path, tiny_model):
    (tmp_path / "data.jsonl").write_text(json.dumps({"problem": "Leo has"}))
    args = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tmp_path / "data.jsonl")]
    with pytest.raises(ValueError, match="`math_reward` needs the gold answers"):
        tracerl_math.main(
            *make_parser(TraceRLConfig).parse_args_and_config([*args, "--output_dir", str(tmp_path), *CPU])
        )


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


def test_demo_leaves_its_artefacts_and_prints_no_warning(tmp_path):
    result = start(
        "tracerl_math.py",
        *("--sft_steps", "3", "--max_steps", "2", "--sft_problems", "64", "--rl_problems", "16"),
        *("--eval_problems", "12", "--seed", "3", "--output_dir", str(tmp_path)),
    )
    assert "after SFT" in result.stdout and "after TraceRL" in result.stdout
    lines = [line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]", result.stderr)]
    said = [line for line in lines if line and "%|" not in line]  # all but the bars
    untrained = [line for line in said if "No group has any reward signal" in line]  # of so few steps
    assert said == untrained
    assert "warn" not in result.stdout.lower()
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


def run_demo(tmp_path, *args):
    quick = ["--sft_steps", "2", "--max_steps", "2", "--sft_problems", "64", "--rl_problems", "16"]
    quick += ["--eval_problems", "8", "--max_completion_length", "12", "--disable_tqdm", "true"]
    quick += ["--per_device_train_batch_size", "16", "--output_dir", str(tmp_path)]
    summary = _demo.main([*quick, *args])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and summary["rl_steps"] == 2
    assert (tmp_path / "reward.png").is_file() and (tmp_path / "trace.html").is_file()
    return summary


FAST = ("coupled", "just_grpo")


@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OBJECTIVES]
)
def test_demo_of_every_objective(tmp_path, capsys, objective):
    summary = run_demo(tmp_path, "--objective", objective)
    assert summary["objective"] == objective and summary["value_model"] is None
    assert f"after {'TraceRL' if objective == 'trace' else objective}" in capsys.readouterr().out


@pytest.mark.parametrize("value_model", ["copy", pytest.param("adapter", marks=pytest.mark.slow)])
def test_demo_with_a_value_model(tmp_path, capsys, value_model):
    summary = run_demo(tmp_path, "--value_model", value_model)
    assert summary["objective"] == "trace" and summary["value_model"] == value_model
    assert f"after TraceRL, {value_model} as critic" in capsys.readouterr().out


def test_demo_has_settings_for_objectives(monkeypatch, tmp_path):
    """In data: what an objective changes comes before the command line, which wins."""
    for name in yaml.safe_load((_demo.CONFIGS / "objectives.yaml").read_text()):
        objective = "trace" if name.startswith("value-") else name
        _, config_class = find_objective(["--objective", objective])
        TrlParser((_demo.DemoArguments, config_class)).parse_args_and_config(_demo.settings_of(name))
    (tmp_path / "objectives.yaml").write_text("coupled: {learning_rate: 1.0e-5, objective_kwargs: {estimate: pair}}\n")
    (tmp_path / "tracerl.yaml").write_text((_demo.CONFIGS / "tracerl.yaml").read_text())
    monkeypatch.setattr(_demo, "CONFIGS", tmp_path)
    parser = TrlParser((_demo.DemoArguments, CoupledGRPOConfig))
    settings = _demo.settings_of("coupled")
    _, args = parser.parse_args_and_config(settings)
    assert args.learning_rate == 1e-5 and args.objective_kwargs == {"estimate": "pair"}
    assert args.output_dir == "runs/demo-coupled" and args.max_steps == 120
    _, args = parser.parse_args_and_config([*settings, "--learning_rate", "1.0", "--output_dir", str(tmp_path)])
    assert args.learning_rate == 1 and args.output_dir == str(tmp_path)


def test_objectives_have_their_trainers(tmp_path):
    assert TRAINERS.keys() <= OBJECTIVES.keys()
    (tmp_path / "run.yaml").write_text("objective: diffu_grpo\n")
    config = ["--config", str(tmp_path / "run.yaml")]
    for args, name, config_class in [
        ([], "trace", TraceRLConfig),
        (["--objective=coupled"], "coupled", CoupledGRPOConfig),
        (["--learning_rate", "1", "--objective", "random_mask"], "random_mask", RandomMaskGRPOConfig),
        (["--value_model", "copy"], "trace", TraceRLConfig),
        (config, "diffu_grpo", RandomMaskGRPOConfig),
        ([*config, "--objective", "gdpo"], "gdpo", DiffusionGRPOConfig),
    ]:
        assert find_objective(args) == (name, config_class)
    with pytest.raises(ValueError, match=r"`objective` must be one of \['agrpo'.* but is 'dpo'"):
        find_objective(["--objective", "dpo"])


def test_a_config_of_tracerls_for_another_objective(tmp_path, capsys):
    config = RECIPES / "configs" / "llada-8b" / "math.yaml"
    args = ["--config", str(config), "--objective", "gdpo", "--output_dir", str(tmp_path), *CPU]
    _, training_args, _ = _objectives.parse(make_parser(DiffusionGRPOConfig), args)
    assert training_args.objective == "gdpo" and training_args.temperature == 0.8
    assert "left out: --shrink" in capsys.readouterr().out
    for wrong in (["--shrink", "8"], ["--estimate", "pair"]):
        with pytest.raises(ValueError, match=f"no arguments .*{wrong[0]}"):
            _objectives.parse(make_parser(DiffusionGRPOConfig), [*args, *wrong])


@pytest.mark.parametrize("objective", ["coupled", "gdpo"])
def test_another_objective_on_a_file(tmp_path, tiny_model, problems_file, objective):
    args = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(problems_file), "--instruction", ""]
    args += ["--num_generations", "4", "--per_device_train_batch_size", "4", "--max_completion_length", "16", *CPU]
    args += ["--max_steps", "1", "--report_to", "none", "--objective", objective, "--output_dir", str(tmp_path)]
    _, config_class = find_objective(args)
    tracerl_math.main(*make_parser(config_class).parse_args_and_config(args))
    assert trainer_of(config_class(str(tmp_path), **ON_CPU))._tag_names[-1] in (tmp_path / "README.md").read_text()


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


PROGRAM = "```python\nprint(int(input()) + 1)\n```"
USER, ASSISTANT = {"role": "user", "content": "Leo adds 1."}, {"role": "assistant", "content": PROGRAM}
SFT_ROWS = {
    "problem": {"problem": "Leo adds 1.", "solution": PROGRAM},
    "prompt": {"prompt": "Leo adds 1.", "solution": PROGRAM},
    "messages": {"messages": [USER, ASSISTANT]},
    "thinking": {"messages": [USER, ASSISTANT]},
}


@pytest.mark.parametrize("rows", ["math", *SFT_ROWS])
def test_sft_on_a_file(tmp_path, tiny_model, problems_file, rows):
    """Problems of both kinds, in every form that is understood."""
    if rows != "math":
        problems_file = tmp_path / "programs.jsonl"
        problems_file.write_text("\n".join([json.dumps(SFT_ROWS[rows])] * 8))
    args = [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", str(problems_file), "--instruction", ""),
        *("--max_length", "64", "--max_steps", "2", "--report_to", "none", "--output_dir", str(tmp_path), *CPU),
        *(["--generation_prompt", "<|assistant|>We"] if rows == "thinking" else []),
    ]
    sft_math.main(*make_parser(DiffusionSFTConfig).parse_args_and_config(args))
    assert (tmp_path / "model.safetensors").is_file()


def test_tracerl_of_a_thinking_model(tmp_path, tiny_model, problems_file, monkeypatch):
    seen = []

    def spy(prompts: list, completions, **kwargs) -> list[float]:
        seen.extend(prompts)
        return [float(len(set(completion)) % 3) for completion in completions]

    monkeypatch.setitem(_rewards.REWARDS, "math", spy)
    args = [
        *("--model_name_or_path", str(tiny_model), "--dataset_name", str(problems_file), "--instruction", ""),
        *("--generation_prompt", "<|assistant|>We", "--max_steps", "1", "--num_generations", "4"),
        *("--per_device_train_batch_size", "8", "--max_completion_length", "8", "--save_strategy", "no"),
        *("--report_to", "none", "--output_dir", str(tmp_path), *CPU),
    ]
    tracerl_math.main(*make_parser(TraceRLConfig).parse_args_and_config(args))
    assert len(seen) == 8
    assert all(prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>We") for prompt in seen)


def test_sft_default(tmp_path, capsys):
    _demo.sft_main(["--max_steps", "2", "--sft_problems", "64", "--eval_problems", "6", "--output_dir", str(tmp_path)])
    assert "Right answers on 6 held-out problems" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "sdar"


def test_random_model(tmp_path, tiny_model):
    make_random_model(str(tiny_model), str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    copied, own = (json.loads((path / "generation_config.json").read_text()) for path in (tmp_path, tiny_model))
    assert copied == own and own["max_new_tokens"] == 40
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(tmp_path).mask_token_id
