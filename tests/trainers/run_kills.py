"""
Script: runs that are killed with SIGKILL at random moments, also while a checkpoint is written, end with the weights
of one that was not. A process of its own: autograd does not work in the children of a process that has used it.

    python -m tests.trainers.run_kills sft|rl|OBJECTIVE FOLDER KILLS
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from dllm_trl.trainers.checkpoint_files import read_json
from tests.trainers.test_exact_resume import SAVING, make_trainer


OPTIONS = {"max_steps": 8, "save_total_limit": 2, "report_to": "none", "dataloader_num_workers": 0, **SAVING}


def train(kind, folder, resume):
    trainer = make_trainer(kind, folder, **OPTIONS)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder / "final")


def fork(kind, folder, resume):
    """Trains in a child, which has imported all there is to import."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(kind, folder, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_a_checkpoint(child, folder, number):
    """Until a child has begun to write its `number`-th checkpoint (or is done)."""
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if (folder / f"checkpoint-{number}").exists():
            return True
        time.sleep(0.0005)
    return False


def main(kind, base, kills):
    start = time.monotonic()
    assert finish(fork(kind, base / "whole", None)) == 0
    duration = time.monotonic() - start
    expected = (base / "whole" / "final" / "model.safetensors").read_bytes()
    rng = random.Random(kind)
    killed, while_writing = 0, 0
    while killed < kills:
        folder = base / f"killed-{killed}"
        shutil.rmtree(folder, ignore_errors=True)
        child = fork(kind, folder, None)
        if killed % 2:  # at any moment
            time.sleep(rng.uniform(0.3, 1) * duration)
        elif wait_for_a_checkpoint(child, folder, rng.randint(1, 8)):
            time.sleep(rng.uniform(0, 0.02))
        else:
            continue
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
        if finish(child) != -signal.SIGKILL:
            continue  # it was done before
        killed += 1
        checkpoints = list(folder.glob("checkpoint-*"))
        while_writing += any(read_json(path / "trainer_state.json") is None for path in checkpoints)
        log = folder.with_suffix(".log")
        if finish(fork(kind, folder, True)) != 0:
            # Before the first checkpoint was whole there is nothing to go on from, and that is what is said
            assert "No complete checkpoint found" in log.read_text(), log.read_text()[-3000:]
            assert not any(read_json(path / "trainer_state.json") for path in checkpoints)
            shutil.rmtree(folder)
            assert finish(fork(kind, folder, None)) == 0
        assert (folder / "final" / "model.safetensors").read_bytes() == expected, log.read_text()[-3000:]
        shutil.rmtree(folder)
    print(f"{kind}: {killed} killed, {while_writing} of them while a checkpoint was written")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
