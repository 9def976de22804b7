"""The process that judges answers for `math_reward`: one JSON line in, one out. It imports nothing of ours."""

import functools
import json
import logging
import os
import resource
import signal
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


MEMORY_LIMIT = 4 * 2**30  # bytes
# As in TRL's `accuracy_reward`, but for `\frac12` and the like: gold answers are full of them
ANSWER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=True, malformed_operators=True, nits=True),
    boxed_match_priority=0,
    try_extract_without_anchor=False,
)


@functools.lru_cache(maxsize=4096)  # parsing is most of the work, and the responses of a group share their gold answer
def read(text: str, anywhere: bool = False) -> list:
    """Expressions in `text`: in its box or, with `anywhere`, wherever there is mathematics."""
    configs = [LatexExtractionConfig(), ExprExtractionConfig()] if anywhere else [ANSWER]
    return parse(text, configs, extraction_mode="first_match", parsing_timeout=None)


def judge(answer: str, gold: str) -> float | None:
    wanted = read(gold, anywhere=not gold.startswith(r"\boxed"))
    return float(verify(wanted, read(answer), timeout_seconds=None)) if wanted else None


def main() -> None:
    logging.disable()  # math-verify warns that it has no time limit: it has, the timer below
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a print in a library must not pass for a reply
    limit, maximum = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and (limit == resource.RLIM_INFINITY or limit > MEMORY_LIMIT):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, maximum))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # a thread that blocks it starts children that do
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, gold, time_limit = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, time_limit)  # CPU time; the system kills the process when it is up
        reward = judge(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reward), file=replies, flush=True)


if __name__ == "__main__":
    main()
