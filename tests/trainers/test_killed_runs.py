"""
Runs killed with SIGKILL at random moments, also while a checkpoint is written, end with the weights of one that was
not. As many as `DLLM_TRL_KILLS` says, of either kind of run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


KILLS = os.environ.get("DLLM_TRL_KILLS", "4")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl", "coupled"])
def test_killed_runs_end_with_the_same_weights(tmp_path, kind):
    command = [sys.executable, "-m", "tests.trainers.run_kills", kind, str(tmp_path), KILLS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    print(done.stdout)
