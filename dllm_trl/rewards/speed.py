def speed_reward(
    completions: list[str] | list[list[dict[str, str]]], tokens_per_forward: list[float], **kwargs
) -> list[float]:
    r"""
    Reward function for speed: the tokens that each forward pass committed on average while a response was decoded.

    Alone it teaches a model to be sure of itself, not to be right: use it beside a reward for the answer. With
    `multi_objective_aggregation="normalize_then_sum"` the trainer's advantages are sums of z-scores within the group,
    of the answer and of the speed, as in [LightningRL](https://huggingface.co/papers/2603.13319); its filters and its
    likelihood term come with `objective="lightning_rl"`.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions, standard or conversational; not read.
        tokens_per_forward (`list[float]`):
            Committed tokens per denoising forward, one per completion: the trainers of this package pass it.
        **kwargs:
            What else the trainer passes; not used.

    Returns:
        `list[float]`: one reward per completion.

    Example:
    ```python
    >>> from dllm_trl.rewards import speed_reward

    >>> speed_reward(["4", "It is 4."], tokens_per_forward=[1.0, 2.5])
    [1.0, 2.5]
    ```
    """
    if len(tokens_per_forward) != len(completions):
        raise ValueError(
            f"`tokens_per_forward` must have one entry per completion ({len(completions)}), but has "
            f"{len(tokens_per_forward)}."
        )
    return [float(speed) for speed in tokens_per_forward]
