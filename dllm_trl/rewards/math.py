from numbers import Real

from ._answers import compare, final_answer, gold_answer
from ._judge import judge_all
from ._text import completion_texts


LONGEST = 3600.0  # seconds for one answer


def math_reward(
    completions: list[str] | list[list[dict[str, str]]],
    answer: list[str | int | float | None] | None = None,
    solution: list[str | int | float | None] | None = None,
    time_limit: float = 2.0,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that checks the final answer of a completion with
    [math-verify](https://github.com/huggingface/Math-Verify): 1.0 if it equals the gold answer, 0.0 if not, `None`
    (TRL skips the example) where there is no gold answer or math-verify finds no mathematics in it.

    The answer of a completion is its last `\boxed{}` that is complete and not empty, else its last
    `<answer>...</answer>`, else what math-verify finds after words like "the final answer is". A gold answer may be
    the bare answer, or a worked solution with the answer in a `\boxed{}`, after `####` or between dollar signs.

    Numbers are compared here, a percent sign aside (`60%`, `60.0` and `60` are equal). Everything else goes to worker
    processes, so that calls are safe in any thread and an answer like `9^{9^{9^{9}}}` costs `time_limit`, not the run.
    An answer whose worker somebody else kills twice gets `None`, and a warning.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational (then the last message counts).
        answer (`list[str | int | float | None]`, *optional*):
            Gold answers, one per completion. Takes precedence over `solution`.
        solution (`list[str | int | float | None]`, *optional*):
            The same under TRL's name.
        time_limit (`float`, *optional*, defaults to `2.0`):
            Seconds of CPU time for one answer, at most 3600. An answer that takes longer is wrong.
        **kwargs:
            What else the trainer passes; not used.

    Returns:
        `list[float | None]`: one reward per completion.

    Example:
    ```python
    >>> from dllm_trl.rewards import math_reward

    >>> math_reward([r"So it is \boxed{0.5}.", r"So it is \boxed{2}."], answer=[r"\frac{1}{2}", r"\frac{1}{2}"])
    [1.0, 0.0]
    ```
    """
    column, golds = ("answer", answer) if answer is not None else ("solution", solution)
    if golds is None:
        raise ValueError(
            "`math_reward` needs the gold answers, but got neither `answer` nor `solution`: name the column of the "
            'dataset that holds them so, e.g. `dataset.rename_column("ground_truth", "answer")`.'
        )
    if len(golds) != len(completions):
        raise ValueError(f"`{column}` must have one entry per completion ({len(completions)}), but has {len(golds)}.")
    if not isinstance(time_limit, Real) or isinstance(time_limit, bool) or not 0 < time_limit <= LONGEST:
        raise ValueError(
            f"`time_limit` must be above 0 seconds and at most {LONGEST:.0f} (CPU time for one answer), but is "
            f"{time_limit!r}."
        )
    golds = [gold_answer(gold) for gold in golds]
    pairs = [(final_answer(text), gold) for text, gold in zip(completion_texts(completions), golds, strict=True)]
    rewards = {pair: compare(*pair) for pair in pairs if pair[1]}  # equal pairs are judged once
    unsure = [pair for pair, reward in rewards.items() if reward is None]
    rewards.update(zip(unsure, judge_all(unsure, float(time_limit)), strict=True))
    return [rewards.get(pair) for pair in pairs]
