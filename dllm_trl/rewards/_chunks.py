"""The chunks of a response, and the problem that it answers: what rewards for parts of a response are about."""

import re
from typing import Any


def cut_response(text: str, ids: list[int] | None, chunk_tokens: int, tokenizer: Any = None) -> list[str]:
    """
    Chunks of a response, `chunk_tokens` of its tokens each but for the last. Together they are the text.

    Args:
        text (`str`):
            The response.
        ids (`list[int]`, *optional*):
            Its tokens, EOS included: they say how many chunks there are. `None`: those that `tokenizer` makes of the
            text, and without one its words.
        chunk_tokens (`int`):
            Tokens of a chunk.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Says where in the text a chunk ends. Without it the text is cut where the same share of its characters is.
    """
    if ids is None and tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids is None:
        words = re.findall(r"\s*\S+|\s+", text)
        return ["".join(words[start : start + chunk_tokens]) for start in range(0, len(words), chunk_tokens)]
    ends = range(chunk_tokens, len(ids), chunk_tokens)
    if tokenizer is None:
        places = [len(text) * end // len(ids) for end in ends]
    else:
        places = [len(tokenizer.decode(ids[:end], skip_special_tokens=True)) for end in ends]
    places = [0, *(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in zip(places[:-1], places[1:])] if ids else []


def cut_responses(
    texts: list[str], completion_ids: list[list[int]] | None, chunk_tokens: int, tokenizer: Any = None
) -> list[list[str]]:
    """The chunks of each response, as a trainer hands it to a reward function."""
    ids = [None] * len(texts) if completion_ids is None else completion_ids
    return [cut_response(text, own, chunk_tokens, tokenizer) for text, own in zip(texts, ids, strict=True)]


def problem_text(prompt: str | list[dict[str, str]]) -> str:
    """Text of a standard prompt, or of the last thing that the user says in a conversational one."""
    if isinstance(prompt, str):
        return prompt
    said = [message.get("content") or "" for message in prompt if message["role"] == "user"][-1:]
    parts = [part.get("text", "") for part in said[0]] if said and isinstance(said[0], list) else said
    return "".join(parts)


def check_counts(least: int = 1, **counts: int) -> None:
    """Raises unless each is a number from `least` on."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be a whole number from {least} on, but is {value!r}.")


def load_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of that name or folder; one that is none, or a tokenizer already, stays what it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
