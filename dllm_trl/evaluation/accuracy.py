"""Accuracy of a model on problems with answers."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..generation import DiffusionGenerationConfig, generate_rollouts
from ..generation.checks import check_config, check_integer, is_conversation, naming_template
from ..generation.mixin import rollout_inputs
from ..generation.vocabulary import decode_texts
from ..rewards import math_reward


@dataclass
class AccuracyReport:
    r"""
    What [`evaluate_accuracy`] measured.

    Args:
        accuracy (`float`): Share of the judged problems with a reward above 0.5; NaN if none was judged.
        num_problems (`int`): Problems.
        num_skipped (`int`): Problems for which the reward function gave no reward (`None` or NaN).
        tokens_per_forward (`float`): Committed tokens per denoising forward, over all problems.
        mean_completion_length (`float`): Mean tokens of a completion, EOS included.
        eos_share (`float`): Share of completions that ended with EOS and not at the limit.
        decoding (`dict`):
            The parameters that decoding had in the end, from `generation_config`, the checkpoint and the defaults.
        records (`list[dict]`):
            Per problem: `prompt`, `completion` (text), `reward`, `correct`, `completion_length`, `ended_with_eos`,
            `num_forward_passes`, and the problem's other columns.
    """

    accuracy: float
    num_problems: int
    num_skipped: int
    tokens_per_forward: float
    mean_completion_length: float
    eos_share: float
    decoding: dict[str, Any]
    records: list[dict[str, Any]] = field(repr=False)


def _tokenize(tokenizer, prompt: str | list[dict], chat_template_kwargs: dict[str, Any]) -> list[int]:
    """Ids of a prompt, as TRL makes them: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    answered = prompt[-1]["role"] == "assistant"  # an answer that was begun goes on
    with naming_template("tokenizer"):
        return tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not answered,
            continue_final_message=answered,
            tokenize=True,
            return_dict=True,
            **chat_template_kwargs,
        )["input_ids"]


def _check_problems(problems: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(problems, str | Mapping) or not isinstance(problems, Iterable):
        raise ValueError(f"`problems` must be a list of dicts or a `Dataset`, but is a {type(problems).__name__}.")
    problems = list(problems)
    if not problems:
        raise ValueError("`problems` is empty.")
    for i, problem in enumerate(problems):
        if not isinstance(problem, Mapping):
            raise ValueError(f'`problems[{i}]` must be a dict with a "prompt", but is {problem!r}.')
        if not isinstance(problem.get("prompt"), (str, list)) or not problem["prompt"]:
            raise ValueError(
                f'`problems[{i}]` needs a "prompt", text or a list of messages, but has {sorted(problem)}: '
                'name its question so, e.g. `{"prompt": problem["question"], "answer": problem["answer"]}`.'
            )
        if isinstance(problem["prompt"], list) and not is_conversation(problem["prompt"]):
            raise ValueError(
                f'`problems[{i}]["prompt"]` must be text or a list of messages, each with `role` and `content`, but '
                f"is {problem['prompt']!r:.80}."
            )
        if problem.keys() != problems[0].keys():
            raise ValueError(f"`problems[{i}]` has {sorted(problem)}, `problems[0]` has {sorted(problems[0])}.")
    return problems


def _with_eos(model, tokenizer, generation_config: GenerationConfig | None) -> tuple[GenerationConfig, set[int]]:
    """A config that names EOS, from the first that does: the given one, the model's, the tokenizer. And its ids."""
    config = DiffusionGenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    sources = (config, model.generation_config, model.config, tokenizer)
    named = [source.eos_token_id for source in sources if source.eos_token_id is not None]
    config.eos_token_id = named[0] if named else None
    return config, set(torch.tensor(named[:1]).flatten().tolist())


def _effective(model, tokenizer, generation_config: GenerationConfig, seed: int) -> dict[str, Any]:
    """What decoding with that config means for that model."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, _ = model._resolve_generation_config(generation_config, tokenizer, seed=seed)
    config.block_length = config.block_length or config.max_new_tokens  # full attention: the whole response
    config.denoising_steps = config.denoising_steps or config.block_length
    about_the_call = ("num_return_sequences", "return_dict_in_generate", "transformers_version")
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in about_the_call}
    if callable(config.remasking_strategy):  # goes to JSON
        strategy = config.remasking_strategy
        settings["remasking_strategy"] = getattr(strategy, "__name__", type(strategy).__name__)
    return settings


def evaluate_accuracy(
    model,
    tokenizer,
    problems: Iterable[dict[str, Any]],
    reward_func: Callable[..., list[float | None]] = math_reward,
    generation_config: GenerationConfig | None = None,
    num_slots: int | None = 32,
    batch_size: int = 256,
    seed: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    show_progress: bool = True,
) -> AccuracyReport:
    r"""
    Decodes one response per problem and judges it. `num_slots` and `batch_size` change speed and memory, not results.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A diffusion language model. It is put into evaluation mode meanwhile.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Ids that it has no token for are never sampled.
        problems (list of `dict`, or [`~datasets.Dataset`]):
            Each has a `"prompt"`, text or messages (then the chat template is applied), and the columns that
            `reward_func` asks for: `"answer"` or `"solution"` for [`~rewards.math_reward`].
        reward_func (`Callable`, *optional*, defaults to [`~rewards.math_reward`]):
            Reward function with TRL's signature. A reward above 0.5 is a correct answer, `None` and NaN don't count.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Decoding parameters, over those of the checkpoint. Without an EOS in either, the tokenizer's is taken.
        num_slots (`int`, *optional*, defaults to `32`):
            Rows in flight at a time, `None` for all of a batch.
        batch_size (`int`, *optional*, defaults to `256`):
            Problems handed to the engine at a time: how often the progress bar moves.
        seed (`int`, *optional*):
            Seed of the sampling. `None` takes the config's, else 0.
        chat_template_kwargs (`dict`, *optional*):
            More arguments for the chat template.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`AccuracyReport`]

    Example:
    ```python
    >>> from dllm_trl.evaluation import evaluate_accuracy

    >>> problems = [{"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}]
    >>> report = evaluate_accuracy(model, tokenizer, problems)
    >>> print(f"{report.accuracy:.1%}, {report.tokens_per_forward:.1f} tokens per forward")
    ```
    """
    problems = _check_problems(problems)
    check_integer("batch_size", batch_size, 1)
    check_config(generation_config)
    for name, value in (("tokenizer", tokenizer), ("reward_func", reward_func)):
        if not callable(value) or isinstance(value, type):
            raise ValueError(f"`{name}` must be a {name.replace('_func', ' function')}, but is {value!r}.")
    config, eos_ids = _with_eos(model, tokenizer, generation_config)
    if config.max_time is not None or model.generation_config.max_time is not None:
        raise ValueError(
            "`max_time` ends the responses of one call of `generate` early; an evaluation would depend on "
            "`batch_size` and on the machine. Leave it out of `generation_config`, and lower `max_new_tokens`."
        )
    if seed is None:
        seed = getattr(config, "seed", None) or 0
    prompts = [_tokenize(tokenizer, problem["prompt"], chat_template_kwargs or {}) for problem in problems]
    # All of them, before the first is decoded
    rollout_inputs(model, prompts, config, num_slots=num_slots, seed=seed, tokenizer=tokenizer)
    records, committed, forwards = [], 0, 0
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(problems), desc="Evaluating", unit="problem", disable=not show_progress) as progress:
            for start in range(0, len(problems), batch_size):
                part = slice(start, start + batch_size)
                rollout = generate_rollouts(
                    model,
                    prompts[part],
                    config,
                    num_slots=num_slots,
                    seed=seed,
                    index_offset=start,
                    tokenizer=tokenizer,
                )
                records += _to_records(tokenizer, problems[part], rollout, reward_func, eos_ids)
                committed += (rollout.step_map >= 0).sum().item()
                forwards += rollout.num_forward_passes.sum().item()
                progress.update(len(rollout))
                progress.set_postfix(accuracy=f"{_accuracy(records):.1%}")
    finally:
        model.train(was_training)
    return AccuracyReport(
        accuracy=_accuracy(records),
        num_problems=len(records),
        num_skipped=sum(record["correct"] is None for record in records),
        tokens_per_forward=committed / max(forwards, 1),
        mean_completion_length=sum(record["completion_length"] for record in records) / len(records),
        eos_share=sum(record["ended_with_eos"] for record in records) / len(records),
        decoding=_effective(model, tokenizer, config, seed),
        records=records,
    )


def _to_records(tokenizer, problems, rollout, reward_func, eos_ids: set[int]) -> list[dict[str, Any]]:
    lengths = rollout.completion_mask.sum(1).tolist()
    ids = [row[:length] for row, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)]
    texts = decode_texts(tokenizer, ids, skip_special_tokens=True)
    columns = {key: [problem[key] for problem in problems] for key in problems[0] if key != "prompt"}
    prompts = [problem["prompt"] for problem in problems]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    rewards = reward_func(prompts=prompts, completions=completions, completion_ids=ids, **columns)
    if len(rewards) != len(problems):
        raise ValueError(f"`reward_func` gave {len(rewards)} rewards for {len(problems)} completions.")
    rewards = [None if reward is None or math.isnan(reward) else float(reward) for reward in rewards]
    return [
        {
            **problem,
            "completion": text,
            "reward": reward,
            "correct": None if reward is None else reward > 0.5,
            "completion_length": len(row),
            "ended_with_eos": bool(row) and row[-1] in eos_ids,
            "num_forward_passes": forwards,
        }
        for problem, text, reward, row, forwards in zip(
            problems, texts, rewards, ids, rollout.num_forward_passes.tolist(), strict=True
        )
    ]


def _accuracy(records: list[dict[str, Any]]) -> float:
    judged = [record["correct"] for record in records if record["correct"] is not None]
    return sum(judged) / len(judged) if judged else math.nan
