import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._chunks import check_counts
from ._endpoint import Endpoint


def openai_judge(
    base_url: str,
    model: str,
    api_key_env: str | None = None,
    sampling: dict[str, Any] | None = None,
    time_limit: float = 120.0,
    total_time_limit: float = 900.0,
    retries: int = 3,
    max_concurrency: int = 32,
    cache_dir: str | os.PathLike | None = None,
) -> Callable[[list[str], int], list[list[str | Exception]]]:
    r"""
    A judge for [`process_reward`] behind any OpenAI-compatible endpoint, such as a vLLM server. What goes wrong there
    costs answers, never the run: an exception stands in place of each answer that is missing.

    Args:
        base_url (`str`):
            Address up to `/v1`, as in `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model there.
        api_key_env (`str`, *optional*):
            Environment variable that holds the key. By default none is sent.
        sampling (`dict[str, Any]`, *optional*):
            Further fields of each request. By default `{"temperature": 0.6, "top_p": 0.95}`.
        time_limit (`float`, *optional*, defaults to `120.0`):
            Seconds for one request, from its first byte to the last of its answer.
        total_time_limit (`float`, *optional*, defaults to `900.0`):
            Seconds for all requests of a rollout. Other processes wait for them, and give up after `ddp_timeout`.
        retries (`int`, *optional*, defaults to `3`):
            Further attempts after a time-out, a broken connection, an overload (429), an error of the server (5xx) or
            a reply that cannot be read, each after a longer pause.
        max_concurrency (`int`, *optional*, defaults to `32`):
            Requests at a time, per process.
        cache_dir (`str`, *optional*):
            Folder to keep answers in. What was asked before (model, sampling, question, number of the sample) is read
            from there. Several processes and runs may share it.

    Example:
    ```python
    from dllm_trl.rewards import math_reward, openai_judge, process_reward

    judge = openai_judge("http://localhost:8000/v1", "Qwen/Qwen3-8B", cache_dir="runs/verdicts")
    reward = process_reward(judge, outcome=math_reward)
    ```
    """
    import httpx2

    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"`base_url` must begin with `http://` or `https://`, but is {base_url!r}.")
    check_counts(max_concurrency=max_concurrency)
    check_counts(0, retries=retries)
    for name, value in (("time_limit", time_limit), ("total_time_limit", total_time_limit)):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0 seconds, but is {value!r}.")
    headers = {"Content-Type": "application/json"}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ValueError(f"`api_key_env={api_key_env!r}` names an environment variable that is not set.")
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    url = str(httpx2.URL(f"{base_url.rstrip('/')}/chat/completions"))  # raises if it is none
    cache = None if cache_dir is None else Path(cache_dir)
    endpoint = Endpoint(url, headers, time_limit, total_time_limit, retries, max_concurrency, cache)
    fields = {"model": model, **({"temperature": 0.6, "top_p": 0.95} if sampling is None else sampling)}

    def judge(questions: list[str], num_samples: int) -> list[list[str | Exception]]:
        bodies = [{**fields, "messages": [{"role": "user", "content": question}]} for question in questions]
        return endpoint.ask(bodies, num_samples)

    return judge
