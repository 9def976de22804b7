from collections.abc import Callable
from typing import Any

from ._chunks import check_counts, cut_responses, load_tokenizer, problem_text
from ._text import completion_texts
from ._verdicts import TEMPLATE, fill, judge_vote, parse_verdict, take_votes


def process_reward(
    judge: Callable[[list[str], int], list[list[str | Exception]]],
    chunk_tokens: int = 200,
    num_votes: int = 3,
    outcome: Callable[..., list[float | None]] | None = None,
    tokenizer: Any = None,
    template: str = TEMPLATE,
    parse: Callable[[str], float | None] = parse_verdict,
) -> Callable[..., list[list[float | None]]]:
    r"""
    Makes a reward function that asks a judge about each chunk of a response: a list for each response, with a number
    from -1 to 1 (or `None`) for each of its chunks, as in the process reward of the [TraceRL
    paper](https://huggingface.co/papers/2509.06949). What a judge fails to say is `None`, and one warning.

    Args:
        judge (`Callable`):
            [`openai_judge`], [`transformers_judge`], or a function of a list of questions and a number of samples that
            returns so many answers to each question, an exception in place of one that there is not.
        chunk_tokens (`int`, *optional*, defaults to `200`):
            Tokens of a chunk: `reward_chunk_length` of the trainer's config.
        num_votes (`int`, *optional*, defaults to `3`):
            Times that the judge is asked about each chunk. Unanimous votes are the score.
        outcome (`Callable`, *optional*):
            Reward function that says which whole responses are right (above 0.5), such as [`math_reward`]: where
            votes differ the score is 1 or -1 accordingly. By default it is their mean.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            The policy's, to cut the text exactly where a chunk ends. By default it is cut in proportion.
        template (`str`, *optional*):
            The question, with `{problem}`, `{before}` (the response before the chunk), `{chunk}`, `{response}` (all of
            it) and `{outcome}` ("correct", "incorrect" or "unknown").
        parse (`Callable`, *optional*):
            Verdict in an answer, `None` if there is none. By default a number from -1 to 1 in the last `\boxed{}`.

    Example:
    ```python
    >>> from dllm_trl.rewards import process_reward

    >>> judge = lambda questions, n: [[r"\boxed{-1}" if "is 5" in q else r"\boxed{1}"] * n for q in questions]
    >>> reward = process_reward(judge, chunk_tokens=5)
    >>> reward(prompts=["What is 2 + 2?"], completions=["2 + 2 = 4 So it is 5"])
    [[1.0, -1.0]]
    ```
    """
    check_counts(chunk_tokens=chunk_tokens, num_votes=num_votes)
    if "{chunk}" not in template:
        raise ValueError(f"`template` must hold `{{chunk}}`, the part that is to be judged, but is {template!r}.")
    tokenizer = load_tokenizer(tokenizer)

    def process_reward(completions, prompts, completion_ids=None, **columns) -> list[list[float | None]]:
        texts = completion_texts(completions)
        chunks = cut_responses(texts, completion_ids, chunk_tokens, tokenizer)
        given = {"completions": completions, "prompts": prompts, "completion_ids": completion_ids, **columns}
        rewards = [None] * len(texts) if outcome is None else outcome(**given)
        correct = [None if reward is None else reward > 0.5 for reward in rewards]
        questions = []
        for prompt, text, own, right in zip(prompts, texts, chunks, correct, strict=True):
            word = "unknown" if right is None else "correct" if right else "incorrect"
            fields = {"problem": problem_text(prompt), "response": text, "outcome": word}
            parts = [{"before": "".join(own[:k]), "chunk": chunk} for k, chunk in enumerate(own)]
            questions += [fill(template, **fields, **part) for part in parts]
        votes = iter(take_votes(judge, questions, num_votes, parse))
        return [[judge_vote(next(votes), right) for _ in own] for own, right in zip(chunks, correct, strict=True)]

    process_reward.chunk_tokens = chunk_tokens
    return process_reward
