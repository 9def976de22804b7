"""Bad input at a door: does it say the argument's name, say something else, or go through?"""

import math
import re
import signal
from collections import Counter
from contextlib import contextmanager


NAN, INF = math.nan, math.inf
NOT_INTEGERS = [1.5, "4", NAN, [4], {}, True, 1e30]
NOT_COUNTS = [0, -1, -(10**9), *NOT_INTEGERS]
NOT_NUMBERS = ["x", NAN, [0.5], {}]
SECONDS = 20  # for one input
TALLY = Counter()  # of the whole run


@contextmanager
def time_limit():
    def ring(number, frame):
        raise AssertionError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call, *words: str) -> tuple[str, str]:
    """
    `"clear"`: an error with all the words (regular expressions), of a kind that says "bad input" (RuntimeError: what a
    caller's function raised); `"obscure"`: another; `"silent"`: none.
    """
    try:
        with time_limit():
            result = call()
    except AssertionError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        kinds = (ValueError, TypeError, OSError, RuntimeError)
        clear = isinstance(error, kinds) and all(re.search(word, str(error)) for word in words)
        return ("clear" if clear else "obscure"), said
    return "silent", repr(result)[:80]


def judge(door: str, table: list[tuple]) -> None:
    """Every row `(words, value, call)` of a table: none goes through, hardly any is obscure."""
    counts, faults = Counter(), []
    for words, value, call in table:
        assert words  # the argument's name, at least
        kind, said = outcome(call, *([words] if isinstance(words, str) else words))
        counts[kind] += 1
        if kind != "clear":
            faults.append(f"{kind:<8} {words} = {value!r:.60}: {said[:200]}")
    TALLY.update(counts)
    figures = ", ".join(f"{counts[kind]} {kind}" for kind in ("clear", "obscure", "silent"))
    print(f"\n{door}: {len(table)} inputs, {figures}", *faults, sep="\n  ")
    assert not counts["silent"], "\n".join(faults)
    assert counts["obscure"] <= 0.05 * len(table), "\n".join(faults)


def options(call, names: dict[str, list], words: dict[str, str] | None = None) -> list[tuple]:
    """Rows for `call(**{name: value})`. The error has the name, or the words given for it."""
    words = words or {}
    return [
        (words.get(name, name), value, lambda n=name, v=value: call(**{n: v}))
        for name, values in names.items()
        for value in values
    ]


def spoil(path, damage):
    """Damages a file: a half of it, nothing, other content, or gone."""
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        contents = {"cut": content[: len(content) // 2], "empty": b"", "binary": b"\xff\x00" * 50, "text": b"not this"}
        path.write_bytes(contents[damage])
