"""Rewards that come as lists, a number for each chunk or step of a response: from reward functions to tokens."""

from collections.abc import Callable

import torch
from accelerate.logging import get_logger

from .advantages import population_z_score
from .gae import step_places


logger = get_logger(__name__)


def chunk_z_scores(scores: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Scores of chunks against those of the siblings' chunks of the same index.

    Args:
        scores (`torch.FloatTensor` of shape `(N, K)`):
            Scores of the chunks of each response, siblings adjacent; NaN where a response has no such chunk, or no
            score of it.
        num_generations (`int`):
            Responses per group.

    Returns:
        `torch.FloatTensor` of shape `(N, K)`: z-scores with the population standard deviation, 0 where all are equal,
        NaN where `scores` is NaN. A score that no sibling has one beside stays as it is.
    """
    scaled = torch.stack([population_z_score(column, num_generations) for column in scores.unbind(1)], dim=1)
    known = ~scores.isnan()
    company = known.view(-1, num_generations, scores.size(1)).sum(1).repeat_interleave(num_generations, 0)
    return torch.where(company > 1, scaled, scores).masked_fill(~known, torch.nan)


def place_chunks(
    scores: torch.Tensor, step_map: torch.Tensor, length: int, chunk_length: int, block_length: int | None = None
) -> torch.Tensor:
    """
    Puts the score of each chunk on the tokens that completed it.

    Args:
        scores (`torch.FloatTensor` of shape `(K,)`):
            Scores of the chunks. Those beyond the last chunk are left out, and those that are NaN.
        step_map (`torch.LongTensor` of shape `(R,)`):
            Step that each token was committed in.
        length (`int`):
            Tokens of the response.
        chunk_length (`int`):
            Tokens of a chunk; the last one may be shorter.
        block_length (`int`, *optional*):
            The score goes to the tokens of the largest step in the last `block_length` tokens up to the end of the
            chunk, that of the last chunk to those of the largest step of the whole response, whatever score they had.
            `None`: to the tokens of the largest step in the chunk, and so for the last chunk.

    Returns:
        `torch.FloatTensor` of shape `(R,)`, 0 where there is no score.
    """
    placed = scores.new_zeros(step_map.shape)
    num_chunks = -(-length // chunk_length)
    for k, score in enumerate(scores[:num_chunks]):
        end = min((k + 1) * chunk_length, length)
        start = k * chunk_length
        if block_length is not None:
            start = max(0, end - block_length) if k < num_chunks - 1 else 0
        steps = step_map[start:end]
        if not score.isnan():
            placed[start:end][steps == steps.max()] = score
    return placed


def place_steps(scores: torch.Tensor, step_map: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """`(B, R)`: the `t`-th of the scores `(B, K)` of a response on every token of its `t`-th step, else 0."""
    places, _ = step_places(step_map, trained)
    has_score = trained & (places < scores.size(1))
    placed = scores.nan_to_num(0.0).gather(1, places.clamp(max=scores.size(1) - 1))
    return placed * has_score


def place_lists(
    scores: torch.Tensor,
    step_map: torch.Tensor,
    completed: torch.Tensor,
    chunk_length: int | None,
    block_length: int,
) -> torch.Tensor:
    """
    Rewards `(B, R)` of tokens.

    Args:
        scores (`torch.FloatTensor` of shape `(B, K)`):
            Normalised scores of the chunks (steps) of each response, NaN where it has none.
        step_map (`torch.LongTensor` of shape `(B, R)`):
            Step that each token was committed in.
        completed (`torch.BoolTensor` of shape `(B, R)`):
            Tokens of the responses.
        chunk_length (`int`, *optional*):
            Tokens of a chunk. `None`: there is a score for each step.
        block_length (`int`):
            Tokens denoised together; of a chunk that is shorter, the chunk counts.
    """
    if chunk_length is None:
        return place_steps(scores, step_map, completed)
    steps, lengths, window = step_map.cpu(), completed.sum(1).tolist(), min(block_length, chunk_length)
    rows = zip(scores.cpu(), steps, lengths, strict=True)
    return torch.stack([place_chunks(*row, chunk_length, window) for row in rows]).to(step_map.device)


def as_list(reward) -> list | None:
    """A reward that is a list (tuple, vector) as a list, `None` for one number."""
    if isinstance(reward, list | tuple):
        return list(reward)
    return reward.tolist() if getattr(reward, "ndim", 0) == 1 else None


def summarize(scores: list[float | None]) -> float | None:
    """What stands for a list where one number is wanted: the mean of what is there."""
    known = [score for score in scores if score is not None and score == score]
    return sum(known) / len(known) if known else None


def split_lists(
    accelerator, rewards: torch.Tensor, lists: list[list[list | None]], weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Parts rewards that are numbers from those that are lists.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Says what the other processes have.
        rewards (`torch.FloatTensor` of shape `(N, F)`):
            Rewards of all processes, with means in place of lists.
        lists (`list[list[list[float | None] | None]]`):
            For each of the `F` functions, the lists that it gave this process's responses, `None` where it gave a
            number; empty if it gave numbers only.
        weights (`torch.FloatTensor` of shape `(F,)`):
            Weights of the functions.

    Returns:
        `(N, F)` `rewards` with NaN in place of lists, and `(N, K)` the weighted sums of the lists, NaN where there is
        nothing to add. `None` in place of the latter: no process has lists.
    """
    rows = len(rewards) // accelerator.num_processes
    columns = [column or [None] * rows for column in lists]
    is_list = torch.tensor([[one is not None for one in column] for column in columns], device=rewards.device).T
    is_list = accelerator.gather(is_list.contiguous())
    if not is_list.any():
        return rewards, None
    width = max(1, *(len(one or ()) for column in columns for one in column))
    scores = torch.full((rows, len(columns), width), torch.nan)
    for function, column in enumerate(columns):
        for row, one in enumerate(column):
            values = [torch.nan if score is None else float(score) for score in one or ()]
            scores[row, function, : len(values)] = torch.tensor(values)
    total = (scores * weights.to(scores).unsqueeze(1)).nansum(1).masked_fill(scores.isnan().all(1), torch.nan)
    total = accelerator.pad_across_processes(total.to(rewards.device), dim=1, pad_index=torch.nan)
    return rewards.masked_fill(is_list, torch.nan), accelerator.gather(total)


def check_lists(
    names: list[str],
    lists: list[list[list | None]],
    completion_ids: list[list[int]],
    step_map: torch.Tensor,
    chunk_length: int | None,
) -> None:
    """Says, once for each function, that its lists do not have a number for each chunk (step) of the responses."""
    lengths = [len(ids) for ids in completion_ids]
    if chunk_length is None:
        counts = [len(steps[:length].unique()) for steps, length in zip(step_map, lengths, strict=True)]
    else:
        counts = [-(-length // chunk_length) for length in lengths]
    for name, column in zip(names, lists, strict=True):
        if all(one is None or len(one) in (0, count) for one, count in zip(column, counts)):
            continue
        parts = "denoising step" if chunk_length is None else f"chunk of {chunk_length} tokens"
        logger.warning_once(
            f"The lists that '{name}' in `reward_funcs` returns do not have one number for each {parts} of a response "
            f"(`reward_chunk_length={chunk_length}`). Numbers too many are left out, those that lack are missing "
            "rewards."
        )


def check_chunk_lengths(names: list[str], functions: list[Callable], chunk_length: int | None) -> None:
    """Raises if a reward function says (`chunk_tokens`) that it cuts chunks of another length than `chunk_length`."""
    for name, function in zip(names, functions, strict=True):
        own = getattr(function, "chunk_tokens", chunk_length)
        if own != chunk_length:
            raise ValueError(
                f"`reward_chunk_length={chunk_length}`, but the reward function '{name}' cuts responses into chunks "
                f"of {own} tokens. Set `reward_chunk_length={own}`."
            )
