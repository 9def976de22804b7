import re

from ._text import completion_texts, find_boxes, last_box


def format_reward(
    completions: list[str] | list[list[dict[str, str]]], pattern: str | None = None, **kwargs
) -> list[float]:
    r"""
    Reward function that checks whether a completion has the requested format: 1.0 if so, 0.0 otherwise.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational (then the last message counts).
        pattern (`str`, *optional*):
            Regular expression that must be found in the completion; `.` also matches line breaks, `\A` and `\Z` tie it
            to the ends. By default the completion must hold exactly one `\boxed{}`, complete and not empty: the one
            answer that [`math_reward`] reads.
        **kwargs:
            What else the trainer passes; not used.

    Returns:
        `list[float]`: one reward per completion.

    Example:
    ```python
    >>> from dllm_trl.rewards import format_reward

    >>> format_reward([r"It is \boxed{4}.", "It is 4.", r"\boxed{3} or \boxed{4}"])
    [1.0, 0.0, 0.0]
    >>> format_reward(["<think>2 + 2</think> 4", "4"], pattern=r"\A<think>.+</think>")
    [1.0, 0.0]
    ```
    """
    texts = completion_texts(completions)
    if pattern is None:
        return [float(len(find_boxes(text)) == 1 and last_box(text) != "") for text in texts]
    try:
        regex = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(f"`pattern` must be a regular expression as a string, but is {pattern!r}: {error}.") from None
    return [float(regex.search(text) is not None) for text in texts]
