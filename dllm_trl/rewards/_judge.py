"""
Judges answers with math-verify in worker processes. SymPy can take forever, and math-verify's own time limit works in
the main thread only. Here the operating system kills the worker, and the next answer gets a new one.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


MAX_WORKERS = 4
_WORKER = Path(__file__).with_name("_math_worker.py")
# Run by path, with the import path of this process: neither the user's script nor PyTorch is imported again
_COMMAND = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)
_thread = threading.local()


class _Worker:
    """One worker process, started when it is first asked and again when it was killed."""

    process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(_WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer
        )
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(
                "`math_reward` cannot start its worker: run `python -c 'import math_verify'` to see why."
            )
        return process

    def judge(self, answer: str, gold: str, time_limit: float) -> float | None:
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        self.process.stdin.write(json.dumps([answer, gold, time_limit]) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if reply:
            return json.loads(reply)
        self.process.communicate()  # killed: out of time or memory
        return 0.0


def _judge(pair: tuple[str, str], time_limit: float) -> float | None:
    if not hasattr(_thread, "worker"):
        _thread.worker = _Worker()
    return _thread.worker.judge(*pair, time_limit)


@functools.cache
def _pool(pid: int) -> ThreadPoolExecutor:
    # One thread per worker. By process id: a forked child has none of its parent's threads
    return ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="math_reward")


def judge_all(pairs: list[tuple[str, str]], time_limit: float) -> list[float | None]:
    """
    Rewards of `(answer, gold)` pairs: 1.0 or 0.0 (also when out of time), `None` where math-verify finds nothing in
    the gold answer.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("`math_reward` needs math-verify: `pip install dllm-trl[math]`.")
    return list(_pool(os.getpid()).map(functools.partial(_judge, time_limit=time_limit), pairs))
