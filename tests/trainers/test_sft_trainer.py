"""`DiffusionSFTTrainer` on tiny models: data, loss, accumulation, evaluation, resume, refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.trainers.chat_template import mark_assistant
from dllm_trl.types import Round

from .tiny_rl import BLOCK, ON_CPU, TINY, make_model, make_tokenizer


EOS, MASK = 1, 2
KINDS = pytest.mark.parametrize("family", TINY)
PAIRS = {
    "prompt": [f"{i}+{i % 7}=" + " " * (i % 4) for i in range(12)],
    "completion": [f"{i + i % 7} is it" + "!" * (i % 5) for i in range(12)],
}
TEXTS = {"text": [f"{p}{c}" for p, c in zip(*PAIRS.values())]}
CHATS = {
    "messages": [
        [
            {"role": "user", "content": f"what is {i}"},
            {"role": "assistant", "content": f"it is {i}"},
            {"role": "user", "content": "sure"},
            {"role": "assistant", "content": "yes" * (i + 1)},
        ]
        for i in range(4)
    ]
}


def make_trainer(tmp_path, data=PAIRS, model=None, processing_class=None, eval_data=None, callbacks=None, **options):
    values = {
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "router_aux_loss_coef": 0.0,  # not linear in what shares a micro-batch; it has a test of its own
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **ON_CPU,
    }
    model_options = {name: options.pop(name) for name in ("peft_config", "compute_metrics") if name in options}
    return DiffusionSFTTrainer(
        model=model or make_model(),
        args=DiffusionSFTConfig(str(tmp_path), **(values | options)),
        train_dataset=Dataset.from_dict(data),
        eval_dataset=None if eval_data is None else Dataset.from_dict(eval_data),
        processing_class=processing_class or make_tokenizer(),
        callbacks=callbacks,
        **model_options,
    )


def batch_of(trainer, *rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def trained_texts(trainer, *rows):
    """What is trained of each row, as text."""
    found, _ = trainer._rows(batch_of(trainer, *rows))
    return [trainer._tokenizer.decode(ids[s]) for ids, s in zip(found.canvas_ids, found.trained)]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(got, expected, atol=1e-6):
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


# ------------------------------------------------------------------------------------------------------------ training


@KINDS
def test_training_learns_and_logs(tmp_path, family):
    trainer = make_trainer(tmp_path, model=make_model(family), num_train_epochs=12)
    before = weights(trainer)
    trainer.train()
    assert all((after - before[name]).abs().max() > 0 for name, after in weights(trainer).items())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(logs[0])
    assert sum(log["loss"] for log in logs[-6:]) < 0.7 * sum(log["loss"] for log in logs[:6])
    assert logs[-1]["mean_token_accuracy"] > logs[0]["mean_token_accuracy"]
    per_epoch = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert logs[-1]["num_tokens"] == 12 * per_epoch
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    paper = "2503.09573" if family in BLOCK else "2502.09992"
    assert all(text in card for text in (paper, "Diffusion SFT", "dllm_trl"))


def corruption(trainer, batch):
    """Rows and rounds of an evaluation."""
    rows, _ = trainer._rows(batch)
    rows = dataclasses.replace(rows, draws=trainer.objective.draw(rows, trainer._draws_by_content(rows)))
    return rows, trainer.objective.rounds(rows)


def dense_loss(model, rows, round_, block_length):
    """BD3LM's loss stated plainly: per row a forward over [clean | noisy], sum of nll / p over trained tokens."""
    total = 0
    for i in range(len(rows)):
        prompt = rows.prompt_ids[i][rows.prompt_mask[i] == 1]
        columns = rows.canvas_mask[i].nonzero().flatten()
        clean = torch.cat([prompt, rows.canvas_ids[i, columns]])
        noisy = clean.clone()
        noisy[len(prompt) :][round_.masked[i, columns]] = MASK
        n = len(clean)
        block = torch.arange(n) // block_length
        before, same = block[:, None] > block[None], block[:, None] == block[None]
        mask = torch.cat([torch.cat([before | same, same & False], 1), torch.cat([before, same], 1)])
        logits = model(
            input_ids=torch.cat([clean, noisy])[None],
            position_ids=torch.arange(n).repeat(2)[None],
            attention_mask=mask[None, None],
        ).logits[0, n + len(prompt) :]
        nll = -logits.log_softmax(-1).gather(1, rows.canvas_ids[i, columns, None])[:, 0]
        total += (nll * round_.loss_weight[i, columns] * round_.scored[i, columns]).sum()
    return total / rows.trained.sum()


@pytest.mark.parametrize("block_length", [None, 3])
def test_loss_is_block_diffusions(tmp_path, block_length):
    trainer = make_trainer(tmp_path, block_length=block_length)
    batch = batch_of(trainer, 0, 1, 2, 3)
    rows, (round_,) = corruption(trainer, batch)
    assert round_.scored.any()
    with torch.no_grad():
        expected = dense_loss(trainer.model, rows, round_, block_length or 4)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("loss_norm", ["token", "sequence", "masked", "batch"])
def test_accumulation_does_not_change_the_step(tmp_path, family, loss_norm):
    results = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            model=make_model(family),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=3,
            loss_norm=loss_norm,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((weights(trainer), losses))
    for got, losses in results[1:]:
        assert_same(got, results[0][0])
        assert losses == pytest.approx(results[0][1], rel=1e-4)


def launch(output_dir, processes, **options):
    """Runs `run_sft.py`; returns the weights it ends with and its losses."""
    here = Path(__file__).parent
    output_dir.mkdir()
    file = output_dir / "options.json"
    file.write_text(json.dumps({"output_dir": str(output_dir), "rows": 20, "learning_rate": 1e-2, **options}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command += [str(here / "run_sft.py"), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((output_dir / "state.json").read_text())["log_history"]
    return load_file(output_dir / "model.safetensors"), [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "objective"), [("sdar", None), ("llada", None), ("Dream", None), ("llada", "trace"), ("sdar", "trace")]
)
def test_two_processes_equal_one_with_accumulation(tmp_path, family, objective):
    options = {
        "objective": objective,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "save_strategy": "no",
        "family": family,
    }
    expected, losses = launch(tmp_path / "one", 1, gradient_accumulation_steps=4, **options)
    got, others = launch(tmp_path / "two", 2, gradient_accumulation_steps=2, **options)
    assert len(losses) == 3 and others == pytest.approx(losses, rel=1e-4)
    assert_same(got, expected)


@KINDS
def test_resumed_run_ends_with_the_same_weights(tmp_path, family):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    straight = make_trainer(tmp_path / "straight", model=make_model(family), **options)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", model=make_model(family, seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(weights(resumed), weights(straight), atol=1e-7)
    a, b = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in (straight, resumed))
    assert a == b


def test_best_model_is_loaded_at_the_end(tmp_path):
    """LLaDA's weights have other names in a checkpoint than in memory."""
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "num_tokens", "greater_is_better": False}
    trainer = make_trainer(tmp_path, model=make_model("llada"), eval_data=PAIRS, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    assert_same(weights(trainer), dict(type(trainer.model).from_pretrained(best).named_parameters()), atol=0)


def test_steps_and_seeds_corrupt_differently(tmp_path):
    def corruption(step, seed):
        trainer = make_trainer(tmp_path, seed=seed)
        trainer.state.global_step = step
        batches, _ = trainer.get_batch_samples(iter([batch_of(trainer, 0, 1, 2, 3)]), 1, torch.device("cpu"))
        return trainer.objective.rounds(batches[0]["rows"][0])[0].masked

    assert torch.equal(corruption(0, 42), corruption(0, 42))
    assert not torch.equal(corruption(0, 42), corruption(1, 42))
    assert not torch.equal(corruption(0, 42), corruption(0, 43))


@pytest.mark.parametrize("noise_per", ["block", "sequence"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_noise_options(tmp_path, noise_per, antithetic):
    trainer = make_trainer(tmp_path, noise_per=noise_per, antithetic=antithetic, per_device_train_batch_size=12)
    batches, num_items = trainer.get_batch_samples(iter([batch_of(trainer, *range(12))]), 1, torch.device("cpu"))
    rows, _, _ = batches[0]["rows"]
    (round_,) = trainer.objective.rounds(rows)
    assert num_items == rows.trained.sum()
    levels = [set(weight[scored].tolist()) for weight, scored in zip(round_.loss_weight, rows.trained)]
    assert all(len(found) == 1 for found in levels) == (noise_per == "sequence")
    if noise_per == "sequence":
        strata = sorted(int((1 / found.pop() - 1e-3) / (1 - 1e-3) * 12) for found in levels)
        assert (strata == list(range(12))) == antithetic


@KINDS
def test_dft_weights_by_probability(tmp_path, family):
    plain, dft = (make_trainer(tmp_path, model=make_model(family), loss_type=kind) for kind in ("nll", "dft"))
    batch = batch_of(plain, 0, 1)
    with torch.no_grad():
        assert 0 < dft.compute_loss(dft.model, batch) < plain.compute_loss(plain.model, batch)


def test_a_function_is_an_objective(tmp_path):
    def last_token(rows):
        columns = torch.arange(rows.trained.size(1))
        last = columns == (columns * rows.trained).max(1).values[:, None]
        return [Round(last & rows.trained, last & rows.trained)]

    trainer = make_trainer(tmp_path, objective=last_token, eos_fill=False, max_steps=1)
    _, outputs = trainer.compute_loss(trainer.model, batch_of(trainer, 0, 1, 2), return_outputs=True)
    assert outputs.labels[outputs.labels != -100].tolist() == [EOS] * 3
    trainer.train()
    assert trainer.args.to_dict()["objective"] == "last_token"


# ---------------------------------------------------------------------------------------------------------------- data


def test_prompt_completion_trains_the_completion(tmp_path):
    trainer = make_trainer(tmp_path)
    prompt, completion = PAIRS["prompt"][5], PAIRS["completion"][5]
    fill = -(len(prompt) + len(completion) + 1) % 4
    assert trained_texts(trainer, 5) == [completion + "<eos>" + "<eos>" * fill]
    assert fill > 0


def test_text_trains_all_but_the_first_token(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS, eos_fill=False)
    assert trained_texts(trainer, 3) == [TEXTS["text"][3][1:] + "<eos>"]


@pytest.mark.parametrize(
    "data", [PAIRS, {"input_ids": [[7, 8, 9, 10, 11, 12]] * 4, "completion_mask": [[0] + [1] * 5] * 4}]
)
def test_masks_that_are_not_read_do_not_stop_truncation(tmp_path, data):
    trainer = make_trainer(tmp_path, data, max_length=4, completion_only_loss=False)
    assert {len(row["labels"]) for row in trainer.train_dataset} == {4}


def test_truncated_rows_are_not_filled(tmp_path):
    trainer = make_trainer(tmp_path, max_length=11)
    assert trained_texts(trainer, 4) == [PAIRS["completion"][4][: 11 - len(PAIRS["prompt"][4])]]


def chat_tokenizer(tokenizers_dir):
    """SDAR's published chat template on a tokenizer of characters."""
    special = ["<pad>", "<|endoftext|>", "<|MASK|>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz0123456789 <>/\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".|\n"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|endoftext|>",
        mask_token="<|MASK|>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        chat_template=(tokenizers_dir / "sdar" / "chat_template.jinja").read_text(),
    )


def test_assistant_only_loss_with_the_published_template(tmp_path, tokenizers_dir):
    tokenizer = chat_tokenizer(tokenizers_dir)
    published = tokenizer.chat_template
    model = make_model()
    model.generation_config.eos_token_id = [5, 1]  # <|im_end|>, as published
    options = {"assistant_only_loss": True, "eval_data": CHATS, "max_steps": 1, "max_length": 128}
    trainer = make_trainer(tmp_path, CHATS, model, tokenizer, **options)
    for i, text in enumerate(trained_texts(trainer, 0, 1, 2, 3)):
        spoken = text.replace(" ", "").replace("\n", "").replace("<|endoftext|>", "")  # without the fill
        assert spoken == f"itis{i}<|im_end|><think></think>" + "yes" * (i + 1) + "<|im_end|>"
    assert tokenizer.chat_template == published  # what is saved with the model
    trainer.train()
    assert trainer.evaluate(Dataset.from_dict(CHATS))["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_marked_template_renders_the_same(tokenizers_dir):
    tokenizer = chat_tokenizer(tokenizers_dir)
    marked = mark_assistant(tokenizer.chat_template)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    tools = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "2 and 3"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n5"},
    ]
    for messages in [*CHATS["messages"], tools, tools[:2]]:
        for prompt in (True, False):
            texts = [
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (marked, tokenizer.chat_template)
            ]
            assert texts[0] == texts[1]
    assert mark_assistant("{{ messages }}") is None and mark_assistant(None) is None


@KINDS
def test_packed_documents_give_the_loss_of_their_rows(tmp_path, family):
    padded = make_trainer(tmp_path, model=make_model(family))
    packed = make_trainer(tmp_path, model=make_model(family), packing=True, max_length=40)
    assert len(packed.train_dataset) < len(padded.train_dataset)
    batch = batch_of(packed, *range(len(packed.train_dataset)))
    assert batch["input_ids"].size(0) == 1
    with torch.no_grad():
        expected = padded.compute_loss(padded.model, batch_of(padded, *range(12)))
        torch.testing.assert_close(packed.compute_loss(packed.model, batch), expected, rtol=1e-5, atol=1e-6)
    packed.args.max_steps = 1
    packed.train()


@KINDS
def test_padding_free_gives_the_loss_of_padded_rows(tmp_path, family):
    padded = make_trainer(tmp_path, model=make_model(family))
    free = make_trainer(tmp_path, model=make_model(family), padding_free=True, max_length=None)
    with torch.no_grad():
        losses = [t.compute_loss(t.model, batch_of(t, 1, 4, 7)) for t in (padded, free)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_wrapped_packing_trains_chunks_as_sequences(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS, packing=True, packing_strategy="wrapped", max_length=16, max_steps=1)
    rows, _ = trainer._rows(batch_of(trainer, 0, 1))
    assert rows.trained.sum(1).tolist() == [15, 15] and rows.prompt_mask.sum(1).tolist() == [1, 1]
    trainer.train()


# ---------------------------------------------------------------------------------------------------------- evaluation


@KINDS
def test_evaluation_is_repeatable(tmp_path, family):
    options = {"eval_data": PAIRS, "loss_norm": "sequence"}
    trainer = make_trainer(tmp_path, model=make_model(family), per_device_eval_batch_size=4, **options)
    first = trainer.evaluate()
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= set(first)
    other = make_trainer(tmp_path, model=make_model(family), per_device_eval_batch_size=2, **options)
    assert other.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


@KINDS
def test_metrics_get_real_logits(tmp_path, family):
    seen = {}

    def compute_metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        scored = labels != -100
        seen["nll"] = -logits[scored].log_softmax(-1).gather(1, labels[scored][:, None])[:, 0]
        return {"hits": (logits.argmax(-1) == labels)[scored].float().mean().item()}

    options = {"eval_data": PAIRS, "per_device_eval_batch_size": 12, "eos_fill": False, "loss_norm": "token"}
    trainer = make_trainer(tmp_path, model=make_model(family), compute_metrics=compute_metrics, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_hits"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)
    rows, (round_,) = corruption(trainer, batch_of(trainer, *range(12)))
    loss = (seen["nll"] * round_.loss_weight[round_.scored]).sum() / rows.trained.sum()
    assert loss.item() == pytest.approx(metrics["eval_loss"], rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- models


def test_model_as_string(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = DiffusionSFTTrainer(
        model=str(tmp_path / "model"),
        args=DiffusionSFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=64),
        train_dataset=Dataset.from_dict(PAIRS),
    )
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch_of(trainer, 0, 1))
        other = make_trainer(tmp_path, model=model)
        torch.testing.assert_close(loss, other.compute_loss(other.model, batch_of(other, 0, 1)))


@KINDS
def test_lora_trains_the_adapter_only(tmp_path, family):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, init_lora_weights=False)
    trainer = make_trainer(tmp_path, model=make_model(family), peft_config=adapter, max_steps=2)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, after in weights(trainer).items() if (after - before[name]).abs().max() > 0}
    assert changed and all("lora" in name for name in changed)


def test_virtual_tokens_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`peft_config`.*LoRA"):
        make_trainer(tmp_path, peft_config=config)


def test_moe_adds_the_load_balancing_loss(tmp_path):
    with torch.no_grad():
        losses, logged = [], None
        for coefficient in (0.0, 0.5):
            trainer = make_trainer(tmp_path, model=make_model("sdar_moe"), router_aux_loss_coef=coefficient)
            losses.append(trainer.compute_loss(trainer.model, batch_of(trainer, 0, 1)))
            logged = trainer._metrics["train"].get("aux_loss") or trainer._metrics["eval"].get("aux_loss")
    assert logged[0] > 0
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(0.5 * logged[0]), rtol=1e-4, atol=1e-5)


@KINDS
def test_gradient_checkpointing_changes_nothing(tmp_path, family):
    results = []
    for flag in (False, True):
        trainer = make_trainer(
            tmp_path,
            model=make_model(family),
            gradient_checkpointing=flag,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        results.append(weights(trainer))
    assert_same(results[1], results[0])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_causal_model_is_refused(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=60, num_key_value_heads=1, head_dim=8, **small))
    with pytest.raises(ValueError, match="`model`.*needs a diffusion language model"):
        make_trainer(tmp_path, model=model)


def test_no_mask_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="`model.config.mask_token_id`.*`processing_class.mask_token`"):
        make_trainer(tmp_path, model=make_model(mask_token_id=None), processing_class=tokenizer)
    with pytest.raises(ValueError, match="vocabulary"):
        make_trainer(tmp_path, model=make_model(mask_token_id=1000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, "`block_length` must be an integer of at least 1"),
        ({"block_size": 4}, "use `block_length`"),
        ({"loss_norm": "mean"}, "`loss_norm` must be one of"),
        ({"noise_per": "token"}, "`noise_per` must be one of"),
        ({"noise_eps": 0.0}, "`noise_eps` must lie between"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_unknown_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`objective` must be one of \['ar', 'block'.*'blocks'"):
        make_trainer(tmp_path, objective="blocks")


def test_missing_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has only the columns \['question'\].*`prompt`"):
        make_trainer(tmp_path, {"question": ["a"]})
    with pytest.raises(ValueError, match="`eval_dataset` has only"):
        make_trainer(tmp_path, eval_data={"prompt": ["a"]})


def test_compute_loss_func_is_refused(tmp_path):
    args = DiffusionSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_dict(PAIRS)
    with pytest.raises(ValueError, match="`compute_loss_func` is not supported.*objective"):
        DiffusionSFTTrainer(make_model(), args, train_dataset=data, compute_loss_func=lambda *a, **k: 0)
