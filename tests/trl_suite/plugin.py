"""
pytest plugin under which TRL's own tests run offline: on stock TRL, or with the trainers of this package in the place
of TRL's. Loaded with `-p tests.trl_suite.plugin` by `run.py`.
"""

import ast
import importlib
import json
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch


# Tests that write out ids of Qwen's tokenizer, or count on EOS never being hit by chance
WIDE_VOCABULARY = ("mask_truncated_completions",)


def pytest_addoption(parser):
    group = parser.getgroup("trl-suite")
    group.addoption("--trainers", choices=["stock", "ours"], required=True)
    group.addoption("--stand-ins", type=Path, required=True)
    group.addoption("--results", type=Path, required=True)
    group.addoption("--seconds", type=int, default=120)


def pytest_configure(config):
    _fill_missing_names([Path(argument) for argument in config.args])
    if config.getoption("--trainers") == "ours":
        _swap_trainers()


class _Removed:
    """A name that the tests import and the installed TRL no longer has: a test that uses it fails, others run."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args, **kwargs):
        if self.name.startswith("is_"):
            return False
        raise NotImplementedError(f"The installed TRL has no `{self.name}`.")


def _fill_missing_names(files: list[Path]) -> None:
    for file in {*files, *(file.with_name("testing_utils.py") for file in files)}:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "trl":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        setattr(module, alias.name, _Removed(alias.name))


def _swap_trainers() -> None:
    import trl

    import dllm_trl

    for theirs, ours in (
        ("GRPOTrainer", "TraceRLTrainer"),
        ("GRPOConfig", "TraceRLConfig"),
        ("SFTTrainer", "DiffusionSFTTrainer"),
        ("SFTConfig", "DiffusionSFTConfig"),
    ):
        if hasattr(dllm_trl, ours):
            setattr(trl, theirs, getattr(dllm_trl, ours))


@pytest.fixture
def lazy_shared_datadir(request) -> Path:
    """What pytest-datadir gives."""
    return Path(request.path).parent / "data"


@pytest.fixture(autouse=True)
def _in_stand_ins(request, monkeypatch):
    """Names of models and datasets are looked up in the working directory first, which is how they are found."""
    wide = any(word in request.node.name for word in WIDE_VOCABULARY)
    monkeypatch.chdir(request.config.getoption("--stand-ins") / ("wide" if wide else "narrow"))
    if request.config.getoption("--trainers") == "ours":
        _decode_what_is_mocked(monkeypatch)


def _decode_what_is_mocked(monkeypatch) -> None:
    """A test that mocks `generate` to choose the responses chooses those of our engine too."""
    from transformers.generation.utils import GenerationMixin

    from dllm_trl.trainers import rollouts
    from dllm_trl.trainers.on_policy import OnPolicyCheck
    from dllm_trl.types import DiffusionRollout

    engine, check = rollouts.generate_rollouts, OnPolicyCheck.__call__

    def generate_rollouts(model, prompts, config, **kwargs):
        rollout = engine(model, prompts, config, **kwargs)
        if not isinstance(GenerationMixin.generate, Mock):
            return rollout
        sequences = GenerationMixin.generate(rollout.prompt_ids)
        ids = sequences[:, rollout.prompt_ids.size(1) :]
        ended = torch.isin(ids, torch.tensor(config.eos_token_id)).int()
        inside = ended.cumsum(1) - ended == 0
        steps = torch.arange(ids.size(1)).expand_as(ids)
        return DiffusionRollout(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            completion_ids=ids,
            completion_mask=inside.long(),
            canvas_ids=ids,
            canvas_mask=torch.ones_like(ids),
            step_map=steps,
            logprobs=torch.zeros(ids.shape),
            num_forward_passes=torch.full((len(ids),), ids.size(1)),
            grid=rollout.grid,
        )

    def check_on_policy(*args):
        if not isinstance(GenerationMixin.generate, Mock):  # a mock has no log-probabilities to compare with
            check(*args)

    monkeypatch.setattr(rollouts, "generate_rollouts", generate_rollouts)
    monkeypatch.setattr(OnPolicyCheck, "__call__", check_on_policy)


class _OutOfTime(Exception):
    pass


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    seconds = item.config.getoption("--seconds")

    def stop(signum, frame):
        raise _OutOfTime(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """One line of JSON for each test, written when it ends, so that a crash loses none but its own."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        elif report.failed:
            reason = f"{call.excinfo.typename}: {call.excinfo.value}"
        record = {
            "test": item.path.name + item.nodeid[item.nodeid.index("::") :],
            "outcome": "error" if report.failed and report.when != "call" else report.outcome,
            "seconds": round(call.duration, 1),
            "reason": " ".join(reason.split()),
        }
        with open(item.config.getoption("--results"), "a") as file:
            file.write(json.dumps(record) + "\n")
    return report
