"""Runs in processes of their own: two processes against one, and runs that are killed against one that is not."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .tiny_rl import LENIENT


HERE = Path(__file__).parent
COMMON = {
    "num_generations": 4,
    "max_completion_length": 10,
    "learning_rate": 1e-2,
    "remasking_strategy": "low_confidence_static",
    "denoising_steps": 2,
    "rows": 17,
}


def free_port() -> int:
    """From a range of this test process's own, so that two that look for one at a time don't find the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in range(21000 + 500 * worker, 21500 + 500 * worker):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("No free port.")


def launch(
    output_dir: Path,
    processes: int = 1,
    config_file: Path | None = None,
    script: str = "run_tracerl.py",
    may_fail: bool = False,
    **options,
) -> int:
    """Runs a script beside this file, with a config of `accelerate launch` if there is one, and returns its exit
    status."""
    output_dir.mkdir(exist_ok=True)
    file = output_dir / "options.json"
    common = COMMON if script == "run_tracerl.py" else {"rows": COMMON["rows"]}
    file.write_text(json.dumps({**common, "output_dir": str(output_dir), **options}))
    command = [sys.executable]
    if processes > 1:
        # What `--multi_gpu` says is that accelerate starts several processes; on CPUs they talk through gloo
        kind = ["--multi_gpu"] if config_file is None else ["--config_file", str(config_file)]
        command += ["-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port())]
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [*command, str(HERE / script), str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if result.returncode not in (0, -signal.SIGKILL) and not may_fail:
        raise AssertionError(result.stdout[-4000:])
    return result.returncode


def history(output_dir: Path, name: str) -> list[float]:
    log = json.loads((output_dir / "state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


SLOW = pytest.mark.slow
# Adam's first step is the sign of the gradient, also of one that is rounding alone
TWICE = {"num_iterations": 2, "optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize(
    "family, objective",
    [
        *(("sdar", {}), ("llada", {})),
        pytest.param("sdar", {"objective": "coupled", "scale_rewards": "leave_one_out", **TWICE}, marks=SLOW),
        pytest.param("llada", {"objective": "coupled", "scale_rewards": "leave_one_out", **TWICE}, marks=SLOW),
        pytest.param("sdar", {"objective": "random_mask", **TWICE}, marks=SLOW),
        pytest.param("llada", {"objective": "diffu_grpo", **TWICE}, marks=SLOW),
        pytest.param(
            "sdar", {"objective": "agrpo", "objective_kwargs": {"importance": "entropy"}, **TWICE}, marks=SLOW
        ),
        pytest.param("llada", {"objective": "egspo", "objective_kwargs": {"num_steps": 2}, **TWICE}, marks=SLOW),
        pytest.param(
            "sdar", {"objective": "lightning_rl", "objective_kwargs": LENIENT["lightning_rl"], **TWICE}, marks=SLOW
        ),
    ],
)
def test_two_processes_equal_one_with_accumulation(tmp_path, family, objective):
    """
    Same responses, same loss, same gradient, same weights, with groups that are split over the processes and some that
    are dropped.
    """
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "beta": 0.05,
        "kl_target": "old",
        "accuracy_range": [0.25, 0.5],
        "save_strategy": "no",
        "block_length": 4,
        "family": family,
        **objective,
    }
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", processes=2, gradient_accumulation_steps=2, **options)
    for name in ("reward", "decode/forward_passes", "frac_groups_dropped"):
        assert history(tmp_path / "two", name) == pytest.approx(history(tmp_path / "one", name), abs=1e-6)
    assert 0 < sum(history(tmp_path / "one", "frac_groups_dropped")) < 3
    for name in ("loss", "grad_norm"):
        one = history(tmp_path / "one", name)
        assert len(one) == 3
        assert history(tmp_path / "two", name) == pytest.approx(one, abs=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family, objective",
    [
        ("sdar", None),
        pytest.param("llada", None, marks=SLOW),
        *(pytest.param("sdar", name, marks=SLOW) for name in ("coupled", "random_mask", "diffu_grpo", "egspo")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, family, objective):
    """
    Killed with -9 in the middle of a generation buffer. A buffer lasts 8 updates here and is one epoch, so the run
    stops in the second epoch and goes on with half of the second buffer used.
    """
    options = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 18,
        "save_steps": 1,
        "save_total_limit": 2,
        "rows": 5,
        "block_length": 4,
        "family": family,
        "objective": objective,
    }
    assert launch(tmp_path / "whole", **options) == 0
    assert launch(tmp_path / "killed", kill_at=12, **options) == -signal.SIGKILL
    # The kill may hit while a checkpoint is written: what has no `trainer_state.json` is passed over
    half = tmp_path / "killed" / "checkpoint-12"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a file")
    assert launch(tmp_path / "killed", resume=True, **options) == 0
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert history(tmp_path / "whole", "reward") == history(tmp_path / "killed", "reward")
    assert len(history(tmp_path / "whole", "reward")) == 3  # three buffers, one of them after the resumed one


def test_exit_hooks_run_and_the_process_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, torch\n"
        "from pathlib import Path\n"
        "from accelerate import Accelerator\n"
        "from dllm_trl.trainers.processes import end_processes\n"
        "accelerator = Accelerator(cpu=True)\n"
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "mine = Path(__file__).parent / str(accelerator.process_index)\n"
        "atexit.register(mine.touch)\n"
        "end_processes(accelerator)\n"
        "mine.with_suffix('.late').touch()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {file.name for file in tmp_path.iterdir()} == {"script.py", "0", "1"}
