"""
Speed of `math_reward` beside TRL's `accuracy_reward`, what hostile answers cost, and, for files of generations, how
often the two and a plain numeric comparison of the boxed answer agree.

    python benchmarks/math_reward.py
    python benchmarks/math_reward.py generations.jsonl  # lines with "generation" and "ground_truth"
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

from trl.rewards import accuracy_reward

from dllm_trl.rewards import math_reward


ANSWERS = Path(__file__).parents[1] / "tests" / "fixtures" / "data" / "math500_answers.json"
PROSE = "We look at the numbers one after the other, add what is to be added and drop what is to be dropped. "
HOSTILE = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "10000000!",
    r"\sum_{i=1}^{10^{10}} i^i",
    r"\binom{10^9}{5 \cdot 10^8}",
    "(x+1)^{100000}",
    "x^" * 50 + "2",
    "(" * 240 + "1" + ")" * 240,
    "1" * 100_000,
]


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def stock(texts: list[str], golds: list[str]) -> list[float | None]:
    """TRL's reward function, with the gold answers in boxes: it misreads most bare expressions."""
    return accuracy_reward([[{"content": text}] for text in texts], [rf"\boxed{{{gold}}}" for gold in golds])


def numeric(text: str, gold: str) -> float:
    """Compares what is in the last box as a decimal number."""

    def value(answer):
        try:
            return float(re.sub(r"[\\$,!%\s]", "", answer))
        except ValueError:
            return None

    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", text)
    return float(bool(boxes) and value(boxes[-1]) is not None and value(boxes[-1]) == value(gold))


def speed(count: int) -> None:
    rng = random.Random(0)
    numbers, expressions = [str(n) for n in range(1000)], json.loads(ANSWERS.read_text())
    _, seconds = timed(math_reward, [r"\boxed{\sqrt{4}}"], answer=["2"])
    print(f"first call (a worker starts): {seconds:.2f} s")
    for name, pool in {"numbers": numbers, "expressions": expressions}.items():
        # Groups of 8 with one gold answer each: every other response is right, the others are wrong in their own way
        golds = [gold for _ in range(count // 8) for gold in [rng.choice(pool)] * 8]
        wrong = "+{}" if name == "expressions" else "{}"
        given = [gold + (r"\," if i % 2 else wrong.format(i)) for i, gold in enumerate(golds)]
        texts = [PROSE * 10 + rf"So the answer is \(\boxed{{ {answer} }}\)." for answer in given]
        ours, our_seconds = timed(math_reward, texts, answer=golds)
        theirs, their_seconds = timed(stock, texts, golds)
        differences = sum(a != b for a, b in zip(ours, theirs, strict=True))
        ours, theirs = 1000 * our_seconds / len(texts), 1000 * their_seconds / len(texts)
        print(f"{name}: {ours:.3f} s per 1000, accuracy_reward {theirs:.3f} s; {differences} of {len(texts)} differ")


def hostile() -> None:
    for answer in HOSTILE:
        rewards, seconds = timed(math_reward, [rf"\boxed{{{answer}}}"], answer=["18"])
        print(f"hostile: {seconds:5.2f} s {rewards} {answer[:40]}")


def agreement(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts, golds = [row["generation"] for row in rows], [str(row["ground_truth"]) for row in rows]
    ours, seconds = timed(math_reward, texts, answer=golds)
    votes = zip(ours, stock(texts, golds), map(numeric, texts, golds), strict=True)
    print(f"{path.name}: {sum(ours):.0f} of {len(rows)} correct ({sum(ours) / len(rows):.1%}), {seconds:.2f} s")
    for (our, their, number), n in sorted(Counter(votes).items()):
        print(f"    math_reward {our:.0f}, math-verify as TRL calls it {their:.0f}, numeric {number:.0f}: {n}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines with `generation` and `ground_truth`")
    parser.add_argument("--count", type=int, default=1000, help="completions to time")
    args = parser.parse_args()
    speed(args.count)
    hostile()
    for path in args.files:
        agreement(path)
