"""What the reward functions share: the text of a completion and the boxes in it."""

import re


def completion_texts(completions: list[str] | list[list[dict[str, str]]]) -> list[str]:
    """Text of standard completions (strings) or of the last message of conversational ones; no content is no text."""
    contents = [
        (completion[-1].get("content") if completion else None) if isinstance(completion, list) else completion
        for completion in completions
    ]
    return [content or "" for content in contents]


def find_boxes(text: str) -> list[str]:
    r"""Contents of the complete `\boxed{}` of `text`, in the order in which they open. One pass, whatever the text."""
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
    return [text[start:end].strip() for start, end in sorted(spans)]
