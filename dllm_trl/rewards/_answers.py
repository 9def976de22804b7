r"""
What `math_reward` compares: the final answer of a completion and the gold answer of a problem. Both are
`\boxed{...}`, or prose in which math-verify has to find the answer. No answer is an empty string.
"""

import re
from fractions import Fraction
from numbers import Real

from ._text import last_box


_DELIMITED = re.compile(r"\${1,2}([^$]+)\${1,2}|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,50}\.?\d{0,50}|\.\d{1,50})", re.ASCII)
# 1 1/2, of which math-verify reads the 1. It knows 1\frac{1}{2}
_MIXED = re.compile(r"(?<![\w.^}])(\d+)(?:\s|~|\\[ ,;:!])+(\d+)\s*/\s*(\d+)(?!\d|\.\d)", re.ASCII)


def _mixed_numbers(text: str) -> str:
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text)


def _boxed(answer: str) -> str:
    answer = _mixed_numbers(answer.strip())
    delimited = _DELIMITED.fullmatch(answer)
    answer = delimited[delimited.lastindex].strip() if delimited else answer
    return rf"\boxed{{{answer}}}" if answer else ""


def final_answer(text: str) -> str:
    r"""Last complete and non-empty `\boxed{}` of a completion, else its last `<answer>`, else prose with an answer."""
    box = last_box(text)
    tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
    if box or tagged[1]:
        return _boxed(box or tagged[2])
    return _mixed_numbers(text) if "answer" in text.lower() else ""  # math-verify reads prose only after this word


def gold_answer(gold: str | int | float | None) -> str:
    r"""Gold answer of a problem: bare, or in a worked solution (boxed, after `####`, between dollar signs)."""
    if gold is None or gold != gold:  # NaN is how pandas says that there is none
        return ""
    if not isinstance(gold, (str, Real)):
        raise ValueError(f"`answer` (or `solution`) must hold strings or numbers, but has {gold!r}.")
    answer = last_box(str(gold)) or str(gold).rpartition("####")[2].strip()
    is_prose = not _DELIMITED.fullmatch(answer) and re.search(r"(?<!\\)\$.*\S", answer)
    return _mixed_numbers(answer) if is_prose else _boxed(answer)


def _number(answer: str) -> Fraction | None:
    """Value of a decimal number with or without thousands separators, dollar and percent signs; else `None`."""
    bare = answer.removeprefix(r"\boxed{").removesuffix("}")
    if len(bare) > 100:
        return None
    bare = re.sub(r"\\[!,;: ]|\\?[$%]", "", bare.replace("{,}", ",").replace("\u2212", "-")).strip()
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    return Fraction(bare) if _NUMBER.fullmatch(bare) else None


def compare(answer: str, gold: str) -> float | None:
    """Reward of an answer, `None` where it takes mathematics to say."""
    if answer == gold or not answer:
        return float(answer == gold)
    if answer.startswith(r"\boxed") and len(answer) > 500 + 2 * len(gold):
        return 0.0  # a model that repeats itself: SymPy would take seconds to find out
    given, wanted = _number(answer), _number(gold)
    if given is None or wanted is None:
        return None
    if given == wanted:
        return 1.0
    # Not for us: math-verify rounds decimals and knows that 60% is 0.6
    different = given.denominator == wanted.denominator == 1 and "%" not in answer + gold
    return 0.0 if different else None
