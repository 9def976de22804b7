"""Every field of the installed `GRPOConfig` and `SFTConfig` acts, is refused by name, or is listed with a reason."""

from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from dllm_trl.trainers.unread_options import UNREAD, UNREAD_IN_RL

from . import test_sft_trainer, test_tracerl_trainer
from .tiny_rl import letter_reward, make_model, make_tokenizer


# Where options that have a test of their own have it
TESTED = {
    "router_aux_loss_coef": "test_constructor_checks.py::test_router_loss",
    "trust_remote_code": "test_constructor_checks.py::test_a_family_of_ones_own_beside_its_checkpoint_needs_trust",
}
TESTED_IN_RL = TESTED | {
    "disable_dropout": "test_exact_resume.py::test_adapters_resume",
    "num_generations_eval": "test_tracerl_trainer.py::test_evaluation",
    "ds3_gather_for_generation": "test_sharded.py::test_ways_of_sharding_that_cannot_decode_are_refused",
    "cache_implementation": "test_tracerl_trainer.py::test_refused_options",
    "use_vllm": "test_tracerl_trainer.py::test_refused_options",
    "use_transformers_continuous_batching": "test_tracerl_trainer.py::test_refused_options",
    "log_completions": "test_tracerl_trainer.py::test_conversational_prompts_and_completions_table",
    "num_completions_to_print": "test_exact_resume.py::test_completions_of_training_and_evaluation",
}
TESTED_IN_SFT = TESTED | {
    "padding_free": "test_sft_trainer.py::test_padding_free_gives_the_loss_of_padded_rows",
    "assistant_only_loss": "test_sft_trainer.py::test_assistant_only_loss_with_the_published_template",
}

# Options that training itself shows: what they are compared with, and a value that must make a difference
TWICE = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
MOVING = {"beta": 0.5, "max_steps": 3, "learning_rate": 1e-2}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef": 0.1}
SAPO, VESPO = {"loss_type": "sapo", **TWICE}, {"loss_type": "vespo", **TWICE}
SHOWN_IN_RL = {
    "num_generations": ({}, 2),
    "max_completion_length": ({}, 4),
    "shuffle_dataset": ({}, False),
    "generation_batch_size": ({}, 16),
    "steps_per_generation": ({}, 2),
    "temperature": ({}, 0.7),
    "top_p": ({}, 0.5),
    "top_k": ({}, 3),
    "min_p": ({}, 0.2),
    "generation_kwargs": ({}, {"seed": 3}),
    "repetition_penalty": ({}, 1.5),
    "beta": ({"max_steps": 3}, 0.5),
    "num_iterations": ({}, 2),
    "epsilon": (TWICE, 1e-4),
    "epsilon_high": (TWICE, 1e-4),
    "delta": (TWICE, 1e-3),
    "sapo_temperature_neg": (SAPO, 5.0),
    "sapo_temperature_pos": (SAPO, 5.0),
    "vespo_k_pos": (VESPO, 5.0),
    "vespo_lambda_pos": (VESPO, 9.0),
    "vespo_k_neg": (VESPO, 9.0),
    "vespo_lambda_neg": (VESPO, 9.0),
    "importance_sampling_level": ({"loss_type": "grpo", **TWICE}, "sequence"),
    "reward_weights": ({"rewards": 2}, [0.5, 2.0]),
    "multi_objective_aggregation": ({"rewards": 2}, "normalize_then_sum"),
    "scale_rewards": ({"scale_rewards": "group"}, "none"),
    "loss_type": ({}, "cispo"),
    "mask_truncated_completions": ({}, True),
    "sync_ref_model": (MOVING | {"ref_model_sync_steps": 1}, True),
    "ref_model_mixup_alpha": (MOVING | {"sync_ref_model": True, "ref_model_sync_steps": 1}, 0.1),
    "ref_model_sync_steps": (MOVING | {"sync_ref_model": True, "ref_model_sync_steps": 3}, 1),
    "top_entropy_quantile": ({}, 0.3),
    "entropy_coef": ({}, 0.5),
    "use_adaptive_entropy": ({"entropy_coef": 0.5}, True),
    "entropy_coef_min": ({**ADAPTIVE, "entropy_target": 0.0, "entropy_coef_delta": 0.5}, 0.05),
    "entropy_coef_max": ({**ADAPTIVE, "entropy_coef_delta": 0.5}, 0.2),
    "entropy_coef_delta": (ADAPTIVE, 0.5),
    "entropy_target": (ADAPTIVE, 0.0),
    "off_policy_mask_threshold": (TWICE, -1.0),
    "use_bias_correction_kl": ({"beta": 0.5, **TWICE}, False),
}
LONG = {"max_length": 8}
SHOWN_IN_SFT = {
    "dataset_text_field": ({"data": {"text": ["abcdef"] * 8, "other": ["uvwxyz"] * 8}}, "other"),
    "eos_token": ({}, "."),
    "max_length": ({}, 8),
    "truncation_mode": (LONG | {"completion_only_loss": False}, "keep_end"),
    "shuffle_dataset": ({}, True),
    "packing": ({"max_length": 40}, True),
    "packing_strategy": ({"max_length": 24, "packing": True}, "wrapped"),
    "completion_only_loss": ({}, False),
    "loss_type": ({}, "dft"),
}

# Neither acts on the numbers of a run nor is it refused
REASONS_IN_RL = {
    "log_unique_prompts": "chooses what TRL prints",
    "log_completions_hub_repo": "uploads the files that `log_completions` writes: needs the Hub",
    "use_transformers_paged": "TRL's old name of `use_transformers_continuous_batching`, refused with it",
    "chat_template_kwargs": "tested below",
    "model_init_kwargs": "tested below",
    "cast_lm_head_to_fp32": "tested below",
}
REASONS_IN_SFT = {
    "dataset_num_proc": "changes the speed of preparation only",
    "pad_token": "tested below: padding itself is taken out again",
    "model_init_kwargs": "tested below",
    "chat_template_path": "tested below",
    "dataset_kwargs": "tested below",
    "eval_packing": "tested below",
    "activation_offloading": "refused on a CPU, tested below; elsewhere TRL's own context around a training step",
}
STOCK = {
    "the optimizer, its schedule and its steps are stock `Trainer`'s": """
        learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args
        optim_target_modules lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps
        gradient_accumulation_steps average_tokens_across_devices per_device_train_batch_size
        torch_empty_cache_steps""",
    "logging is stock `Trainer`'s": """
        log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
        logging_strategy report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        disable_tqdm skip_memory_metrics include_num_input_tokens_seen debug""",
    "saving, resuming and uploading are stock `Trainer`'s, and `test_exact_resume.py` tests what we add": """
        output_dir save_strategy save_steps save_total_limit save_on_each_node save_only_model ignore_data_skip
        restore_callback_states_from_checkpoint resume_from_checkpoint enable_jit_checkpoint push_to_hub hub_model_id
        hub_strategy hub_token hub_private_repo hub_always_push hub_revision""",
    "when to evaluate and which model is best is stock `Trainer`'s": """
        do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end
        metric_for_best_model greater_is_better per_device_eval_batch_size""",
    "the data loader is stock `Trainer`'s": """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context remove_unused_columns
        accelerator_config auto_find_batch_size""",
    "processes are accelerate's, and `test_distributed.py` and `test_sharded.py` run several": """
        local_rank ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
        ddp_timeout fsdp fsdp_config deepspeed parallelism_config""",
    "random state is stock `Trainer`'s, and tests of both trainers resume and reseed": "seed full_determinism",
    "devices and precision: `test_constructor_checks.py::test_half_precision_that_a_cpu_does_not_have`": """
        use_cpu bf16 fp16 bf16_full_eval fp16_full_eval tf32""",
    "checkpointing changes nothing: `test_sft_trainer.py::test_gradient_checkpointing_changes_nothing`": """
        gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
        activation_checkpointing_kwargs""",
    "`test_neftune.py` in SFT, refused in RL (`test_constructor_checks.py`)": "neftune_noise_alpha",
}
STOCK_IN_SFT = {
    "order and metrics are stock `Trainer`'s": """
        data_seed train_sampling_strategy length_column_name prediction_loss_only label_names include_for_metrics
        batch_eval_metrics eval_do_concat_batches eval_use_gather_object eval_accumulation_steps""",
}


def own_fields(config):
    return {field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("config", "kinds", "stock"),
    [
        (GRPOConfig, [TESTED_IN_RL, SHOWN_IN_RL, UNREAD_IN_RL, REASONS_IN_RL], STOCK),
        (SFTConfig, [TESTED_IN_SFT, SHOWN_IN_SFT, UNREAD, REASONS_IN_SFT], STOCK | STOCK_IN_SFT),
    ],
    ids=["rl", "sft"],
)
def test_every_field_has_one_place(config, kinds, stock):
    grouped = [name for names in stock.values() for name in names.split()]
    listed = [*grouped, *(name for kind in kinds for name in kind)]
    assert sorted(listed) == sorted({field.name for field in fields(config)})
    assert not own_fields(config) & set(grouped)  # these are walked one by one
    for name, place in kinds[0].items():
        file, test = place.split("::")
        text = (Path(__file__).parent / file).read_text()
        assert f"def {test}(" in text and name in text


def outcome(trainer):
    trainer.train()
    timed = ("runtime", "per_second", "time")
    logs = [
        {k: v for k, v in log.items() if not any(word in k for word in timed)} for log in trainer.state.log_history
    ]
    return logs, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def run(kind, folder, options):
    if kind == "sft":
        return outcome(test_sft_trainer.make_trainer(folder, **{"max_steps": 2, **options}))
    rewards = [letter_reward, length_reward][: options.get("rewards", 1)]
    options = {name: value for name, value in options.items() if name != "rewards"}
    return outcome(test_tracerl_trainer.make_trainer(folder, reward_funcs=rewards, **options))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    @cache
    def of(kind, name):
        return run(kind, tmp_path_factory.mktemp("base"), bases[kind][name])

    bases = {"rl": {n: b for n, (b, _) in SHOWN_IN_RL.items()}, "sft": {n: b for n, (b, _) in SHOWN_IN_SFT.items()}}
    first = {}  # options that are compared with the same run share it
    for kind, options in bases.items():
        for name, base in options.items():
            first.setdefault((kind, str(base)), name)
    return lambda kind, name: of(kind, first[kind, str(bases[kind][name])])


@pytest.mark.parametrize(
    ("kind", "name"), [*(("rl", name) for name in SHOWN_IN_RL), *(("sft", name) for name in SHOWN_IN_SFT)]
)
def test_an_option_makes_a_difference(tmp_path, baseline, kind, name):
    base, value = (SHOWN_IN_RL if kind == "rl" else SHOWN_IN_SFT)[name]
    assert run(kind, tmp_path, base | {name: value}) != baseline(kind, name)


def test_nothing_makes_no_difference(tmp_path, baseline):
    for kind, name in (("rl", "top_p"), ("sft", "loss_type")):
        assert run(kind, tmp_path, {}) == baseline(kind, name)


def other_value(config, name):
    """One that `name` accepts and that is not its default."""
    known = {
        "label_names": ["x"],
        "train_sampling_strategy": "sequential",
        "torch_compile_backend": "eager",
        "torch_compile_mode": "default",
        "vllm_mode": "server",
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_cap": 2.0,
        "vllm_importance_sampling_clip_min": 0.5,
        "include_for_metrics": ["loss"],
        "pad_to_multiple_of": 8,
        "liger_kernel_config": {"rope": True},
        "transformers_continuous_batching_config": {"x": 1},
        "length_column_name": "x",
        "label_smoothing_factor": 0.1,
    }
    if name in known:
        return known[name]
    default = next(field.default for field in fields(config) if field.name == name)
    assert default is not MISSING
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return default + "x"
    return 7 if default is None else default + 1


@pytest.mark.parametrize("kind, name", [*(("rl", name) for name in UNREAD_IN_RL), *(("sft", name) for name in UNREAD)])
def test_an_option_that_nothing_reads_is_refused(tmp_path, kind, name):
    config, make = {
        "rl": (GRPOConfig, test_tracerl_trainer.make_trainer),
        "sft": (SFTConfig, test_sft_trainer.make_trainer),
    }[kind]
    aliases = {"vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max"}
    named = "torch_compile" if name.startswith("torch_compile") else aliases.get(name, name)
    effect = "is not supported" if (kind, name) == ("sft", "label_smoothing_factor") else "would have no effect in"
    with pytest.raises(ValueError, match=f"`{named}(=.*)?`? {effect}"):
        make(tmp_path, **{name: other_value(config, name)})


def test_how_a_model_is_loaded(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for make in (test_tracerl_trainer.make_trainer, test_sft_trainer.make_trainer):
        trainer = make(tmp_path, model=str(tmp_path / "model"), model_init_kwargs={"dtype": "bfloat16"})
        assert trainer.model.dtype == torch.bfloat16


def test_a_head_in_single_precision(tmp_path):
    for wanted in (False, True):
        model = make_model().to(torch.bfloat16)
        trainer = test_tracerl_trainer.make_trainer(tmp_path, model, cast_lm_head_to_fp32=wanted, max_steps=1)
        trainer.train()
        assert trainer.model.lm_head.weight.dtype == (torch.float32 if wanted else torch.bfloat16)


def test_what_a_chat_template_gets(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ greeting }}" + tokenizer.chat_template
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]] * 8})
    trainer = test_tracerl_trainer.make_trainer(
        tmp_path, dataset=prompts, processing_class=tokenizer, chat_template_kwargs={"greeting": "hello"}
    )
    prompt = trainer._tokenize_prompts([prompts[0]["prompt"]])[0][0]
    assert tokenizer.decode(prompt).startswith("hello<user>ab")


def test_what_prepares_sft_data(tmp_path):
    make = test_sft_trainer.make_trainer
    other = make_tokenizer()
    other.chat_template = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    trainer = make(tmp_path, test_sft_trainer.CHATS, chat_template_path=str(tmp_path / "other"))
    assert trainer._tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("<user>what is 0<user>it is 0")

    assert make(tmp_path, pad_token="?")._tokenizer.pad_token == "?"
    ready = {"input_ids": [[7, 8, 9, 10]] * 4, "labels": [[-100, 8, 9, 10]] * 4}
    trainer = make(tmp_path, ready, dataset_kwargs={"skip_prepare_dataset": True}, max_length=2)
    assert len(trainer.train_dataset[0]["input_ids"]) == 4
    with pytest.raises(ValueError, match="`dataset_kwargs` has `add_special_tokens`, which would have no effect"):
        make(tmp_path, dataset_kwargs={"add_special_tokens": False})
    rows = [len(make(tmp_path, eval_data=test_sft_trainer.PAIRS, eval_packing=p).eval_dataset) for p in (False, True)]
    assert rows[0] == 12 and rows[1] < 12
    with pytest.raises(ValueError, match="`activation_offloading=True` moves activations .* no accelerator"):
        make(tmp_path, activation_offloading=True)
