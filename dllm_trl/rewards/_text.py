"""What the reward functions share: the text of a completion and the boxes in it."""

import re


def completion_texts(completions: list[str] | list[list[dict[str, str]]]) -> list[str]:
    """Text of standard completions (strings) or of the last message of conversational ones; no content is no text."""
    texts = []
    for i, completion in enumerate(completions):
        if isinstance(completion, list):
            completion = completion[-1].get("content") if completion else None
        if not isinstance(completion, str | None):
            raise ValueError(
                f"`completions[{i}]` must be a string or a list of messages whose `content` is a string, but has "
                f"{completion!r}."
            )
        texts.append(completion or "")
    return texts


def find_boxes(text: str) -> list[tuple[int, int]]:
    r"""
    Where the contents of the complete `\boxed{}` of `text` start and end, in the order in which they open. One pass,
    and no copies: of nested boxes those would grow with the square of the text.
    """
    open_braces, spans = [], []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0].startswith("\\boxed"):
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                spans.append((start, match.start()))
    return sorted(spans)


def last_box(text: str) -> str:
    r"""Contents of the last complete and non-empty `\boxed{}` of `text`, an empty string if there is none."""
    contents = (text[start:end].strip() for start, end in reversed(find_boxes(text)))
    return next(filter(None, contents), "")  # one copy: boxes without content lie beside each other
