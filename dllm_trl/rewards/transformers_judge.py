import zlib
from collections.abc import Callable
from typing import Any

from ._chunks import check_counts
from ._models import device_of, load_model


def transformers_judge(
    model: Any,
    tokenizer: Any = None,
    max_new_tokens: int = 1024,
    sampling: dict[str, Any] | None = None,
    batch_size: int = 8,
) -> Callable[[list[str], int], list[list[str | Exception]]]:
    r"""
    A judge for [`process_reward`] that is a causal language model in this process. Its samples are a function of the
    question and leave torch's generators as they were.

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            The model, or its name or folder: then it is loaded when it is first asked, to the accelerator if there is
            one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default the one that lies beside the model. Its chat template, if it has one, frames the question.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Tokens of an answer.
        sampling (`dict[str, Any]`, *optional*):
            Further arguments of `generate`. By default `{"do_sample": True, "temperature": 0.6, "top_p": 0.95}`.
        batch_size (`int`, *optional*, defaults to `8`):
            Answers that are generated at a time.
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    load = load_model("AutoModelForCausalLM", model, tokenizer)
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.95} if sampling is None else sampling

    def judge(questions: list[str], num_samples: int) -> list[list[str | Exception]]:
        import torch

        judging, reader = load()
        texts = [frame(reader, question) for question in questions for _ in range(num_samples)]
        answers = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            inputs = reader(batch, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(zlib.crc32("\0".join([str(start % num_samples), *batch]).encode()))
                output = judging.generate(
                    **inputs.to(device_of(judging)),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=reader.pad_token_id,
                    **fields,
                )
            new = output[:, inputs["input_ids"].size(1) :]
            answers += reader.batch_decode(new, skip_special_tokens=True)
        return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]

    return judge


def frame(tokenizer: Any, question: str) -> str:
    """`question` as the user's turn of a chat."""
    if tokenizer.chat_template is None:
        return question
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
