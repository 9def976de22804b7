"""What the pages say about the code is true of the code."""

import ast
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from datasets import Dataset

import dllm_trl
from dllm_trl import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    objectives,
    scoring,
    types,
)
from dllm_trl.scoring import layout

from .trainers.tiny_rl import ON_CPU, letter_reward, make_model, make_prompts, make_tokenizer


ROOT = Path(__file__).parents[1]
ROOMS = {"modeling": "A family", "objectives": "An objective", "generation/samplers": "A sampler"}
ROOMS |= {"rewards": "A reward"}
FEW_STEPS = {"max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True, **ON_CPU}
# No family, objective or sampler
SHARED = {"base", "masks", "plans", "recompute", "common", "corruptions", "value", "lightning_terms", "steps"}
SHARED |= {"__init__"}


def section(title: str) -> str:
    return (ROOT / "CONTRIBUTING.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_lines_of_contributing(room):
    limit = int(re.search(r"under (\d+) lines", section(ROOMS[room]))[1])
    paths = [path for path in (ROOT / "dllm_trl" / room).glob("[!_]*.py") if path.stem not in SHARED]
    lengths = {path.stem: len(path.read_text().splitlines()) for path in paths}
    assert max(lengths.values()) < limit, lengths


@pytest.mark.parametrize("title", ROOMS.values())
def test_snippets_of_contributing_import_what_they_use(title):
    """Imports, classes and functions run; of the rest, every name is known."""
    code = ast.parse(re.search(r"```python\n(.*?)```", section(title), re.DOTALL)[1])
    known = {"model", "input_ids"}
    done = [
        node for node in code.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))
    ]
    namespace = {"__name__": "snippet"}
    sys.modules["snippet"] = sys.modules[__name__]  # dataclasses look their module up
    try:
        exec(compile(ast.Module(done, []), title, "exec"), namespace)
    finally:
        del sys.modules["snippet"]
    bound = {node.arg for node in ast.walk(code) if isinstance(node, ast.arg)}
    bound |= {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used <= namespace.keys() | namespace["__builtins__"].keys() | bound | known


def test_settings_of_the_paper_are_those_of_the_recipe():
    page = (ROOT / "docs" / "tracerl_trainer.md").read_text()
    said = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    recipe = yaml.safe_load((ROOT / "recipes" / "configs" / "trado-4b" / "math.yaml").read_text())
    assert said and said.items() <= recipe.items()
    assert not re.search(r"loss_type\W+dr_grpo", page + (ROOT / "README.md").read_text())
    assert recipe["loss_type"] == "dapo"


def test_examples_use_a_kl_term_only_where_it_acts():
    """With `kl_target="old"` it needs several updates per rollout."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            assert 'kl_target="old"' not in code or "num_iterations" in code, path


def run_snippet(code: str, names: dict) -> dict:
    names = names | {"__name__": __name__}  # dataclasses look their module up
    exec(code, names)
    return names


def snippets(page: str, title: str) -> list[str]:
    """The Python of a section of a page."""
    section = (ROOT / "docs" / page).read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_types_of_the_architecture_have_what_the_page_says():
    """A row of the table: a type, its fields, who makes it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    flow = page.split("## From a rollout to a loss\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", flow, re.MULTILINE)
    assert len(rows) == 7
    for name, fields in rows:
        held = next(getattr(room, name) for room in (types, layout, scoring, objectives) if hasattr(room, name))
        said = re.findall(r"`(\w+)`", fields)
        assert said and set(said) <= held.__dataclass_fields__.keys(), name
    for method in re.findall(r"^\| `Objective\.(\w+)\(", page, re.MULTILINE):
        assert callable(getattr(objectives.Objective, method))


@pytest.mark.parametrize("family", ["sdar", "Dream"])
def test_snippets_of_packing_score_the_rollout(family):
    """Both give the log-probabilities that the rollout recorded."""
    found = {"model": make_model(family).eval(), "tokenizer": make_tokenizer()}
    scored, packed = snippets("packing.md", "Use")
    with torch.no_grad():
        exec(scored, found)
        rollout, trained = found["rollout"], found["rows"].trained
        torch.testing.assert_close(found["logps"], rollout.logprobs * trained, atol=1e-4, rtol=1e-4)
        exec(packed, found)
    torch.testing.assert_close(found["matrix"].sum(0), rollout.logprobs * trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("number", [0, 1])
def test_sft_objectives_of_ones_own_train(tmp_path, monkeypatch, number, family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dllm_trl, "DiffusionSFTConfig", partial(DiffusionSFTConfig, block_length=4, **FEW_STEPS))
    found = run_snippet(snippets("sft_trainer.md", "An objective of your own")[number], {})
    trainer = DiffusionSFTTrainer(
        make_model(family),
        found["args"],
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "2+2= "], "completion": ["3 is it", "4!"]}),
        processing_class=make_tokenizer(),
    )
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("number", [0, 1])
def test_rl_objectives_of_ones_own_train(tmp_path, monkeypatch, number, family):
    monkeypatch.chdir(tmp_path)
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8, "block_length": 4}
    monkeypatch.setattr(dllm_trl, "DiffusionGRPOConfig", partial(DiffusionGRPOConfig, **options, **FEW_STEPS))
    trainer = partial(DiffusionGRPOTrainer, processing_class=make_tokenizer())
    monkeypatch.setattr(dllm_trl, "DiffusionGRPOTrainer", trainer)
    given = {"model": make_model(family), "reward": letter_reward, "dataset": make_prompts()}
    trainer = run_snippet(snippets("tracerl_trainer.md", "An objective of your own")[number], given)["trainer"]
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_the_judge_of_the_page_judges():
    found = run_snippet(snippets("rewards.md", "`process_reward`")[1], {})
    assert found["scores"] == [[1.0, -1.0]]


def test_rewards_of_the_page_are_lists_of_chunks():
    function, _ = snippets("rewards.md", "A list for each response")[0].split("\n\n\n")
    variety = run_snippet(function, {})["variety"]
    assert variety(completion_ids=[[1] * 50 + [1, 2], []]) == [[0.02, 1.0], []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = make_model()
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def test_chat_draws_drafts(folder):
    environment = {"PYTHONPATH": str(Path(dllm_trl.__file__).parents[1]), "PYTHONIOENCODING": "utf8"}
    shown = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "chat.py"), folder],
        input="one\ntwo\n",
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf8",
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\0337") == 2 and shown.stdout.count("\0338") > 4


def test_server_sends_drafts_and_text(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from serve import make_server

    server = make_server(folder, 0)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        body = json.dumps([{"role": "user", "content": "1+1?"}]).encode()
        with urlopen(Request(f"http://127.0.0.1:{server.server_port}", body), timeout=60) as answer:
            lines = answer.read().decode().split("\n\n")
    finally:
        server.shutdown()
        server.server_close()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert events[-1] == {"done": True} and {"draft", "text"} <= {key for event in events for key in event}
