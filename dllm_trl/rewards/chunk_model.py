from collections.abc import Callable
from typing import Any

from ._chunks import check_counts, cut_responses, load_tokenizer
from ._models import device_of, load_model
from ._text import completion_texts


def chunk_rewards(
    model: Any,
    tokenizer: Any = None,
    chunk_tokens: int = 200,
    policy_tokenizer: Any = None,
    batch_size: int = 8,
) -> Callable[..., list[list[float]]]:
    r"""
    Makes a reward function of a sequence-classification model, which scores a response after each of its chunks: a
    list for each response, with the model's score of prompt and response up to the end of each chunk. (In
    `reward_funcs` itself such a model, or its name, scores whole responses.)

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            A model with one label, or its name or folder: then it is loaded when it is first asked, to the accelerator
            if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's. By default the one that lies beside it.
        chunk_tokens (`int`, *optional*, defaults to `200`):
            Tokens of a chunk: `reward_chunk_length` of the trainer's config.
        policy_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            The policy's, to cut the text exactly where a chunk ends. By default it is cut in proportion.
        batch_size (`int`, *optional*, defaults to `8`):
            Texts that are scored at a time.
    """
    check_counts(chunk_tokens=chunk_tokens, batch_size=batch_size)
    load, cutter = load_model("AutoModelForSequenceClassification", model, tokenizer), load_tokenizer(policy_tokenizer)

    def chunk_rewards(completions, prompts, completion_ids=None, **columns) -> list[list[float]]:
        import torch

        scoring, reader = load()
        chunks = cut_responses(completion_texts(completions), completion_ids, chunk_tokens, cutter)
        texts = []
        for prompt, own in zip(prompts, chunks, strict=True):
            texts += [join(reader, prompt, "".join(own[: k + 1])) for k in range(len(own))]
        scores = []
        for start in range(0, len(texts), batch_size):
            inputs = reader(
                texts[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                scores += scoring(**inputs.to(device_of(scoring))).logits[:, 0].tolist()
        scores = iter(scores)
        return [[next(scores) for _ in own] for own in chunks]

    chunk_rewards.chunk_tokens = chunk_tokens
    return chunk_rewards


def join(tokenizer: Any, prompt: str | list[dict[str, str]], response: str) -> str:
    """What a reward model reads of a prompt and a response, as TRL puts it together."""
    if isinstance(prompt, str):
        return prompt + response
    messages = [*prompt, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=False)
