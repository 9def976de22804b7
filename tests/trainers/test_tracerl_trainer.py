"""TraceRL as a user runs it: what changes, what is logged, what is refused."""

import re

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dllm_trl.trainers import TraceRLConfig, TraceRLTrainer, rollouts

from .tiny_rl import ON_CPU, TINY, letter_reward, make_model, make_prompts, make_tokenizer


def make_args(tmp_path, **options):
    options = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 10,
        "remasking_strategy": "low_confidence_static",
        "denoising_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        **ON_CPU,
        **options,
    }
    return TraceRLConfig(str(tmp_path), **options)


def make_trainer(tmp_path, model=None, reward_funcs=letter_reward, dataset=None, **options):
    names = (
        "peft_config",
        "eval_dataset",
        "processing_class",
        "tools",
        "rollout_func",
        "environment_factory",
        "callbacks",
    )
    other = {name: options.pop(name) for name in names if name in options}
    other.setdefault("processing_class", make_tokenizer())
    return TraceRLTrainer(
        model=make_model() if model is None else model,
        reward_funcs=reward_funcs,
        args=make_args(tmp_path, **options),
        train_dataset=make_prompts() if dataset is None else dataset,
        **other,
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(trainer, before):
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_training_changes_every_parameter(tmp_path, moe):
    trainer = make_trainer(tmp_path, make_model("sdar_moe" if moe else "sdar"))
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    for name in (
        "reward",
        "rewards/letter_reward/mean",
        "completions/mean_length",
        "entropy",
        "clip_ratio/region_mean",
    ):
        assert len(logged(trainer, name)) == 2
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    tokens, forwards = logged(trainer, "decode/tokens_per_forward")[0], logged(trainer, "decode/forward_passes")[0]
    assert 1 < tokens <= 2 and tokens * forwards >= logged(trainer, "completions/mean_length")[0]
    assert bool(logged(trainer, "aux_loss")) == moe


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_type_of_trl(tmp_path, loss_type):
    level = "sequence" if loss_type == "luspo" else "token"
    trainer = make_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2)
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    if "clip_ratio/region_mean" in trainer.state.log_history[0]:
        assert logged(trainer, "clip_ratio/region_mean")[0] == 0  # the first update is on-policy


def test_entropy_options_of_trl(tmp_path):
    trainer = make_trainer(tmp_path, entropy_coef=0.1, top_entropy_quantile=0.5, off_policy_mask_threshold=0.5)
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    assert logged(trainer, "entropy_coef") == [0.1, 0.1]


def test_reward_rises(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=12, learning_rate=3e-3, per_device_train_batch_size=16, num_generations=8
    )
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


@pytest.mark.parametrize("rollout_logprobs", [False, True])
def test_kl_to_the_start_of_the_step(tmp_path, rollout_logprobs):
    """No second model; zero on the first update after a rollout, gradient included; it acts from the second one on."""
    options = {"num_iterations": 2, "kl_target": "old", "max_steps": 3, "use_rollout_logprobs": rollout_logprobs}
    trainer = make_trainer(tmp_path / "a", beta=5.0, **options)
    assert trainer.ref_model is None and trainer.beta == trainer.args.beta == 5.0
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] < 1e-9 and kl[1] > 1e-4 and kl[2] < 1e-9
    free = make_trainer(tmp_path / "b", beta=0.0, **options)
    free.train()
    norms, free_norms = logged(trainer, "grad_norm"), logged(free, "grad_norm")
    assert norms[0] == pytest.approx(free_norms[0], rel=1e-4)
    assert norms[1] != pytest.approx(free_norms[1], rel=1e-2)


def test_kl_to_a_reference_model(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "model"), beta=0.1, processing_class=None, max_steps=3)
    reference = weights(trainer.ref_model)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-4 and kl[2] > kl[0]
    for name, value in trainer.ref_model.named_parameters():
        assert torch.equal(value, reference[name])


@pytest.mark.parametrize("family", TINY)
def test_rollout_logprobs_as_old_ones(tmp_path, family):
    """They are the same numbers, so the run is the same, but for the forward pass that is saved."""
    results = []
    for use in (False, True):
        options = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3, "use_rollout_logprobs": use}
        trainer = make_trainer(tmp_path / str(use), make_model(family), block_length=4, **options)
        calls = []
        trainer.model.base_model.register_forward_hook(lambda module, *_, calls=calls: calls.append(module.training))
        trainer.train()
        results.append((weights(trainer.model), sum(calls), logged(trainer, "sampling/sampling_logp_difference/max")))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, atol=1e-4, rtol=0)
    assert results[0][1] - results[1][1] == 2  # one for each of the two rollouts
    assert len(results[0][2]) == len(results[1][2]) == 2


def test_peft(tmp_path):
    """Only the adapter changes; the reference is the model without it; the adapter is what is saved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(
        tmp_path, peft_config=config, beta=0.1, num_iterations=2, save_strategy="steps", save_steps=2
    )
    before = weights(trainer.model)
    trainer.train()
    adapter = {name for name in before if "lora_" in name}
    assert changed(trainer, before) == adapter
    assert trainer.ref_model is None
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6) and logged(trainer, "kl")[1] > 0
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_evaluation(tmp_path):
    """Own number of generations, the same draws every time, and no trace of it in training."""
    options = {"max_steps": 3, "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path / "a", eval_dataset=make_prompts(4), eval_strategy="steps", **options)
    trainer.train()
    assert len(logged(trainer, "eval_reward")) == 3
    assert max(logged(trainer, "eval_sampling/sampling_logp_difference/max")) < 1e-4
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"]
    plain = make_trainer(tmp_path / "b", max_steps=3)
    plain.train()
    assert logged(plain, "reward") == logged(trainer, "reward")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "iterable"])
def test_conversational_prompts_and_completions_table(tmp_path, streaming):
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in make_prompts()
    ]
    dataset = Dataset.from_list(rows)
    seen = []

    def reward(prompts, completions, answer, completion_ids, log_metric, **kwargs):
        seen.extend(zip(prompts, completions, answer, strict=True))
        log_metric("mean_tokens", sum(map(len, completion_ids)) / len(completion_ids))
        return letter_reward(completions)

    dataset = dataset.to_iterable_dataset() if streaming else dataset
    trainer = make_trainer(tmp_path, reward_funcs=reward, dataset=dataset, log_completions=True)
    trainer.train()
    assert all(completion[0]["role"] == "assistant" and prompt[0]["role"] == "user" for prompt, completion, _ in seen)
    answers = {row["prompt"][0]["content"]: row["answer"] for row in rows}
    assert all(answers[prompt[0]["content"]] == answer for prompt, _, answer in seen)
    assert len(logged(trainer, "mean_tokens")) == 2
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert len(table) == 4 and {"prompt", "completion", "reward", "advantage"} <= set(table.columns)
    assert table["advantage"].sum() == pytest.approx(0, abs=1e-5)


def test_resuming_without_a_buffer_decodes_again(tmp_path, warnings_of):
    options = {"num_iterations": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **options).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"half": ')  # killed while it was written
    (tmp_path / "checkpoint-2" / "rollout_state_0.pt").unlink()
    trainer = make_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert any("checkpoint-4 is incomplete" in message for message in warnings_of())
    assert any("holds no rollout buffer" in message for message in warnings_of())
    with pytest.raises(ValueError, match="No complete checkpoint found in `output_dir`"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_training_twice(tmp_path):
    """A second call starts with a rollout of its own, also if the first one stopped in the middle of its buffer."""
    trainer = make_trainer(tmp_path, num_iterations=4, max_steps=2)
    trainer.train()
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    assert len(logged(trainer, "reward")) == 1 and logged(trainer, "sampling/sampling_logp_difference/max")[0] < 1e-4


def test_generation_kwargs(tmp_path):
    """They reach the decoding config; ids to suppress come on top of the vocabulary's padding."""
    kwargs = {"denoising_schedule": "dream", "suppress_tokens": [7, 8]}
    trainer = make_trainer(tmp_path, make_model(vocab_size=60), generation_kwargs=kwargs, entropy_bound=0.7)
    assert trainer.generation_config.denoising_schedule == "dream"
    assert (trainer.generation_config.entropy_bound, trainer.generation_config.confidence_threshold) == (0.7, 0.9)
    padding = list(range(len(trainer.processing_class), 60))
    assert padding and trainer.generation_config.suppress_tokens == [7, 8, *padding]


def test_a_seed_and_filters_of_the_rollout(tmp_path):
    """`generation_kwargs` may hold a seed and filters; the checkpoint's own filters stay out of training."""
    answers = []
    for seed in (None, 3, 3):
        model = make_model()
        model.generation_config.min_new_tokens = 5
        kwargs = {"seed": seed, "typical_p": 0.9} if seed else {}
        trainer = make_trainer(tmp_path / str(len(answers)), model, generation_kwargs=kwargs, max_steps=1)
        assert trainer.generation_config.min_new_tokens == 0
        trainer.train()
        assert bool(logged(trainer, "sampling/sampling_logp_difference/max")) == (seed is None)
        answers.append(list(trainer._logs["completion"]))
    assert answers[0] != answers[1] == answers[2]
    with pytest.raises(ValueError, match="`output_scores=True` is not supported"):
        make_trainer(tmp_path / "refused", generation_kwargs={"output_scores": True})


def test_saved_model_loads_and_the_card_says_what_it_is(tmp_path, warnings_of):
    trainer = make_trainer(tmp_path, block_length=2, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name))
    assert any("trained with `block_length=2`, but its config keeps `block_size=4`" in m for m in warnings_of())
    card = (tmp_path / "README.md").read_text()
    assert "import dllm_trl" in card and "block_length=2" in card and "pipeline(" not in card
    assert "2509.06949" in card and "- tracerl" in card and "trained with TraceRL" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")


# ------------------------------------------------------------------------------------------------------------ rewards


async def async_reward(completions, **kwargs):
    return letter_reward(completions)


def sometimes_none(completions, **kwargs):
    return [None if i % 2 else 1.0 for i in range(len(completions))]


def test_reward_functions_sync_async_and_none(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=[letter_reward, async_reward, sometimes_none], reward_weights=[1, 1, 2]
    )
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    assert logged(trainer, "rewards/async_reward/mean") == logged(trainer, "rewards/letter_reward/mean")
    assert logged(trainer, "rewards/sometimes_none/mean") == [1.0, 1.0]


def needs_a_solution(completions, solution, **kwargs):
    return [1.0] * len(completions)


def asks_for_more(completions, **kwargs):
    return needs_a_solution(completions, **kwargs)


def divides_by_zero(completions, **kwargs):
    return [1 / 0]


async def fails_later(completions, **kwargs):
    raise KeyError("judge")


def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)


def returns_nothing(completions, **kwargs):
    return None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (asks_for_more, "'asks_for_more' raised TypeError.*'solution'.*columns"),
        (divides_by_zero, "'divides_by_zero' raised ZeroDivisionError"),
        (fails_later, "'fails_later' raised KeyError: 'judge'"),
        (infinite, "'infinite' in `reward_funcs` returned an infinite reward"),
        (returns_nothing, "'returns_nothing' raised TypeError"),
    ],
)
def test_failing_reward_functions_are_named_before_any_update(tmp_path, function, message):
    trainer = make_trainer(tmp_path, reward_funcs=[letter_reward, function])
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert not changed(trainer, before)


def test_nan_rewards_are_pointed_out(tmp_path, warnings_of):
    def sometimes_nan(completions, **kwargs):
        return [float("nan"), *letter_reward(completions)[1:]]

    trainer = make_trainer(tmp_path, reward_funcs=sometimes_nan, max_steps=1)
    trainer.train()
    assert any("'sometimes_nan' in `reward_funcs` returned NaN for 1 of 4" in message for message in warnings_of())
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_no_reward_signal_is_said_but_not_in_every_step(tmp_path, warnings_of):
    def constant(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, reward_funcs=constant, max_steps=10, logging_steps=1, num_iterations=1)
    before = weights(trainer.model)
    trainer.train()
    said = [message for message in warnings_of() if "No group has any reward signal" in message]
    assert len(said) == 2 and "constant 0" in said[0] and "`num_generations`" in said[0]
    assert "so far: 1." in said[0] and "so far: 10." in said[1]
    assert not changed(trainer, before)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_all_groups_dropped_is_a_step_without_gradient(tmp_path, warnings_of, loss_type):
    trainer = make_trainer(
        tmp_path,
        reward_funcs=letter_reward,
        accuracy_range=[1.0, 1.0],
        loss_type=loss_type,
        beta=0.1,
        kl_target="old",
        num_iterations=2,
    )
    before = weights(trainer.model)
    trainer.train()
    assert any("All groups were dropped" in m and "`accuracy_range=[1.0, 1.0]`" in m for m in warnings_of())
    assert logged(trainer, "frac_groups_dropped") == [1.0]
    assert logged(trainer, "grad_norm") == [0.0, 0.0] and not changed(trainer, before)


# ----------------------------------------------------------------------------------------------------- on-policy check


@pytest.fixture
def tampered(monkeypatch):
    """Rollouts that report other log-probabilities than those they were sampled with."""
    original = rollouts.generate_rollouts

    def tamper(*args, **kwargs):
        rollout = original(*args, **kwargs)
        rollout.logprobs = rollout.logprobs - 0.1
        return rollout

    monkeypatch.setattr(rollouts, "generate_rollouts", tamper)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_rollout_that_is_not_the_trainers_stops_the_run(tmp_path, tampered, num_iterations):
    trainer = make_trainer(tmp_path, num_iterations=num_iterations)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match="Rollout and trainer disagree .* .mean .difference. 0.1"):
        trainer.train()
    assert not changed(trainer, before)


def test_the_check_can_be_switched_off(tmp_path, tampered):
    trainer = make_trainer(tmp_path, on_policy_check="off")
    trainer.train()
    assert not logged(trainer, "sampling/sampling_logp_difference/max")


@pytest.mark.parametrize("action", ["warn", "error"])
def test_half_precision_warns_or_raises(tmp_path, tampered, warnings_of, action):
    trainer = make_trainer(tmp_path, make_model().bfloat16(), on_policy_check=action, max_steps=1)
    if action == "error":
        with pytest.raises(RuntimeError, match="in half precision"):
            trainer.train()
    else:
        trainer.train()
        assert any("Rollout and trainer disagree" in message for message in warnings_of())


@pytest.mark.parametrize("mixed", [False, True], ids=["weights", "autocast"])
def test_half_precision_agrees(tmp_path, mixed):
    model = make_model() if mixed else make_model().bfloat16()
    trainer = make_trainer(tmp_path, model, bf16=mixed, on_policy_check="error", max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert 0 < logged(trainer, "sampling/sampling_logp_difference/mean")[0] < 0.05
    assert changed(trainer, before)


@pytest.mark.parametrize(
    "options", [{"shrink": 2}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
)
def test_filters_and_shrink_cannot_be_compared(tmp_path, options):
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) == set(before)
    assert not logged(trainer, "sampling/sampling_logp_difference/max")
    with pytest.raises(ValueError, match="`use_rollout_logprobs=True` needs"):
        make_trainer(tmp_path, use_rollout_logprobs=True, **options)


# ---------------------------------------------------------------------------------------------------------- bad input


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "`use_vllm=True` decodes left to right .* Set `use_vllm=False`"),
        ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching=True`"),
        ({"cache_implementation": "static"}, "`cache_implementation`"),
        ({"tools": [print]}, "`tools` is not supported"),
        ({"rollout_func": print}, "`rollout_func` is not supported"),
        ({"environment_factory": dict}, "`environment_factory` is not supported"),
        ({"generation_kwargs": {"temperature": 0.5}}, "`generation_kwargs` must not hold `temperature`"),
        ({"generation_kwargs": {"max_length": 5}}, "must not hold `max_length`.* Set `max_completion_length`"),
        ({"generation_kwargs": {"num_beams": 2}}, "`num_beams`"),
        ({"generation_kwargs": {"steps": 2}}, "use `denoising_steps"),
        ({"remasking_strategy": "best"}, "`remasking_strategy` must be one of"),
        ({"confidence_threshold": 2.0}, "`confidence_threshold`"),
        ({"max_completion_length": 128}, "`max_completion_length=128` fills the model's context of 128"),
    ],
)
def test_refused_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="`model`: .* `LlamaForCausalLM` of model type `llama`"):
        make_trainer(tmp_path, llama())
    llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="model type `llama`, which is no diffusion language model"):
        make_trainer(tmp_path, str(tmp_path / "llama"))
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="Neither the model's config nor `processing_class` names a mask token"):
        make_trainer(tmp_path, make_model(mask_token_id=None), processing_class=tokenizer)
    with pytest.raises(ValueError, match="mask token has id 99, but the model's vocabulary has"):
        make_trainer(tmp_path, make_model(mask_token_id=99))
    assert make_trainer(tmp_path, make_model(mask_token_id=None)).mask_token_id == 2


def test_refused_arguments(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `TraceRLConfig`"):
        TraceRLTrainer(make_model(), letter_reward, {"max_steps": 1}, make_prompts())
    with pytest.raises(TypeError, match="`reward_funcs` must be functions, models or model names, but holds 3"):
        make_trainer(tmp_path, reward_funcs=[letter_reward, 3])
    with pytest.raises(ValueError, match="num_generations"):
        make_trainer(tmp_path, num_generations=3)
    with pytest.raises(ValueError, match="at least 2 generations"):
        make_trainer(tmp_path, num_generations=1)


def test_refused_data(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has no column `prompt`, only \\['problem'\\]"):
        make_trainer(tmp_path, dataset=Dataset.from_dict({"problem": ["a"]}))
    with pytest.raises(ValueError, match="`eval_dataset\\['hard'\\]` has no column `prompt`"):
        make_trainer(tmp_path, eval_dataset={"hard": Dataset.from_dict({"problem": ["a"]})})
    prompts = make_prompts()["prompt"][:]
    for bad, message in [
        ("", "`train_dataset\\[3\\]\\['prompt'\\]` is empty"),
        ("a" * 119, "`train_dataset\\[3\\]\\['prompt'\\]` has 119 tokens, .* leaves room for 118"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": prompts[:3] + [bad] + prompts[3:]}))
        # An iterable dataset is read as training goes on, so such a prompt is found when its turn comes
        stream = Dataset.from_dict({"prompt": [bad] * 4}).to_iterable_dataset()
        with pytest.raises(ValueError, match="(?i)prompt 0 (is empty|has 119 tokens)"):
            make_trainer(tmp_path, dataset=stream).train()
    nameless = Dataset.from_dict({"problem": ["a"] * 4}).to_iterable_dataset()
    nameless = nameless.map(lambda row: row)  # which makes its columns unknown
    assert nameless.column_names is None
    with pytest.raises(ValueError, match="no column `prompt`"):
        make_trainer(tmp_path, dataset=nameless).train()


def test_long_prompts_of_a_large_context_are_not_tokenized(tmp_path, monkeypatch):
    """Only prompts that could be too long are, so that large datasets cost nothing."""
    tokenized = []
    original = TraceRLTrainer._tokenize_prompts

    def tokenize(self, prompts):
        tokenized.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(TraceRLTrainer, "_tokenize_prompts", tokenize)
    prompts = ["a" * 10] * 20 + ["b" * 3000]
    make_trainer(tmp_path, make_model(max_position_embeddings=4096), dataset=Dataset.from_dict({"prompt": prompts}))
    assert tokenized == ["a" * 10, "b" * 3000]  # the first shows whether the chat template works
