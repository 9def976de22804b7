"""What a judge is asked about a chunk, what it says, and what several of its votes come to."""

import logging
import re
from collections import Counter
from collections.abc import Callable

from ._text import last_box


logger = logging.getLogger(__name__)

TEMPLATE = r"""You grade one part of a solution to a problem.

The problem:
{problem}

The solution up to the part:
{before}

The part:
{chunk}

Is there an error, an unfounded claim or a contradiction in the part? It may begin and end in the middle of a sentence,
which is no error. Think it through. Then write \boxed{1} if all of the part is right, and \boxed{-1} if it is not."""


def fill(template: str, **fields: str) -> str:
    """`template` with fields in place of their names in braces; other braces, and those in a field, stay."""
    return re.sub(r"\{(" + "|".join(fields) + r")\}", lambda match: fields[match[1]], template)


def parse_verdict(answer: str) -> float | None:
    r"""The number from -1 to 1 in the last complete `\boxed{}` of a judge's answer, `None` if there is none."""
    box = last_box(answer).strip().strip("$")
    return float(box) if re.fullmatch(r"[-+]?(?:0|1|[01]?\.\d+|[01]\.)", box) and abs(float(box)) <= 1 else None


def judge_vote(votes: list[float], correct: bool | None = None, zero_stands: bool = True) -> float | None:
    """
    What several verdicts on one chunk come to.

    Args:
        votes (`list[float]`):
            The verdicts.
        correct (`bool`, *optional*):
            Whether the whole response is right. `None`: nobody knows.
        zero_stands (`bool`, *optional*, defaults to `True`):
            Whether a unanimous 0 is a verdict; if not, it counts as dissent.

    Returns:
        `float` or `None`: the verdict if it is unanimous, else 1 or -1, as the whole response is right or not, or the
        mean of the votes where nobody knows. `None` without a vote.
    """
    if not votes:
        return None
    if len(set(votes)) == 1 and (zero_stands or votes[0] != 0):
        return float(votes[0])
    return sum(votes) / len(votes) if correct is None else 2.0 * correct - 1.0


def take_votes(
    judge: Callable[[list[str], int], list[list[str | Exception]]],
    questions: list[str],
    num_votes: int,
    parse: Callable[[str], float | None],
) -> list[list[float]]:
    """The verdicts of `judge` on each question, as many as there are, and a warning if one is missing."""
    try:
        answers = judge(questions, num_votes) if questions else []
    except (OSError, RuntimeError) as error:  # no connection, no memory on the device
        answers = [[error] * num_votes for _ in questions]
    if len(answers) != len(questions):
        raise ValueError(f"`judge` must answer each of {len(questions)} questions, but answered {len(answers)}.")
    failures = Counter(f"{type(a).__name__}: {a}" for one in answers for a in one if isinstance(a, Exception))
    verdicts = [[parse(a) for a in one if not isinstance(a, Exception)] for one in answers]
    failures["no verdict in the answer"] = sum(v is None for one in verdicts for v in one)
    votes = [[float(v) for v in one if v is not None] for one in verdicts]
    if failures.total():
        (reason, times), *_ = failures.most_common()
        logger.warning(
            f"`process_reward`: {failures.total()} of {len(questions) * num_votes} votes are missing, {times} of them "
            f"because of: {reason}. {sum(not one for one in votes)} of {len(votes)} chunks have no score."
        )
    return votes
