"""
Judges answers with math-verify in worker processes. SymPy can take forever, and math-verify's own time limit works in
the main thread only. Here the operating system kills the worker, and the next answer gets a new one.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


logger = logging.getLogger(__name__)

MAX_WORKERS = 4
START_LIMIT = 120.0  # seconds on the clock to start a worker
PATIENCE = 5.0  # an answer's seconds of CPU time may take so many times as long on the clock, and `SLACK` more
SLACK = 10.0
# How a worker ends over an answer: out of time, out of memory, or in a crash. Every other end comes from outside
_ENDED_BY_ANSWER = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, 1)
_WORKER = Path(__file__).with_name("_math_worker.py")
# Run by path, with the import path of this process: neither the user's script nor PyTorch is imported again
_COMMAND = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)
_thread = threading.local()


class _KilledError(Exception):
    """A worker was killed from outside while it started or judged."""


@contextlib.contextmanager
def _at_most(seconds: float, process: subprocess.Popen) -> Iterator[None]:
    """Kills the process when time on the clock is up: it was stopped, or its own timer cannot work."""
    guard = threading.Timer(seconds, process.kill)
    guard.daemon = True
    guard.start()
    try:
        yield
    finally:
        guard.cancel()


def _import_path() -> list[str]:
    return [os.fsdecode(entry) for entry in sys.path if isinstance(entry, str | bytes | os.PathLike)]


class _Worker:
    """One worker process, started when it is first asked and again when it was killed."""

    process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(_WORKER), json.dumps(_import_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer
        )
        with _at_most(START_LIMIT, process):
            if "ready\n" in process.stdout:  # after what imports may print
                return process
        process.communicate()
        if process.returncode < 0:
            raise _KilledError(f"signal {-process.returncode}")
        raise RuntimeError("`math_reward` cannot start its worker: run `python -c 'import math_verify'` to see why.")

    def judge(self, answer: str, gold: str, time_limit: float) -> float | None:
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        with _at_most(PATIENCE * time_limit + SLACK, self.process), contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([answer, gold, time_limit]) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
            if reply:
                return json.loads(reply)
        self.process.communicate()
        if self.process.returncode in _ENDED_BY_ANSWER:
            return 0.0
        raise _KilledError(f"signal {-self.process.returncode}")


def _judge(pair: tuple[str, str], time_limit: float) -> float | None | _KilledError:
    if not hasattr(_thread, "worker"):
        _thread.worker = _Worker()
    try:
        return _thread.worker.judge(*pair, time_limit)
    except _KilledError:
        pass  # once more
    try:
        return _thread.worker.judge(*pair, time_limit)
    except _KilledError as error:
        return error


@functools.cache
def _pool(pid: int) -> ThreadPoolExecutor:
    # One thread per worker. By process id: a forked child has none of its parent's threads
    return ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="math_reward")


def judge_all(pairs: list[tuple[str, str]], time_limit: float) -> list[float | None]:
    """
    Rewards of `(answer, gold)` pairs: 1.0 or 0.0 (also when out of time or memory), `None` where math-verify finds
    nothing in the gold answer or the worker was twice killed from outside, which a warning says.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("`math_reward` needs math-verify: `pip install dllm-trl[math]`.")
    rewards = list(_pool(os.getpid()).map(functools.partial(_judge, time_limit=time_limit), pairs))
    killed = [reward for reward in rewards if isinstance(reward, _KilledError)]
    if killed:
        logger.warning(
            f"`math_reward` gives `None` for {len(killed)} of {len(pairs)} answers: their worker process was killed "
            f"twice ({killed[0]}), by something outside, for want of memory on the machine, or because it took more "
            f"than {PATIENCE * time_limit + SLACK:.0f} s on the clock. These answers are neither right nor wrong."
        )
    return [None if isinstance(reward, _KilledError) else reward for reward in rewards]
