"""The process that judges answers for `math_reward`: one JSON line in, one out. It imports nothing of ours."""

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


def judge(answer: str, gold: str) -> float | None:
    configs = [ANSWER] if gold.startswith(r"\boxed") else [LatexExtractionConfig(), ExprExtractionConfig()]
    parsed_gold = parse(gold, configs, extraction_mode="first_match", parsing_timeout=None)
    if not parsed_gold:
        return None
    parsed_answer = parse(answer, [ANSWER], extraction_mode="first_match", parsing_timeout=None)
    return float(verify(parsed_gold, parsed_answer, timeout_seconds=None))


def main() -> None:
    logging.disable()  # math-verify warns that it has no time limit: it has, the timer below
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a print in a library must not pass for a reply
    limit, maximum = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and (limit == resource.RLIM_INFINITY or limit > MEMORY_LIMIT):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, maximum))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, gold, time_limit = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, time_limit)  # CPU time; the system kills the process when it is up
        reward = judge(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reward), file=replies, flush=True)


if __name__ == "__main__":
    main()
