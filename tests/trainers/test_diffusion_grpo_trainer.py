"""The base trainer: what is scored is what the rollout saw, and TRL's loss gets it unchanged."""

import ast
import inspect
import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from dllm_trl.generation.progress import RolloutBar
from dllm_trl.objectives import FunctionObjective
from dllm_trl.objectives.dipo import dipo_loss
from dllm_trl.scoring import Scores
from dllm_trl.trainers import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionSFTConfig,
    TraceRLConfig,
    TraceRLTrainer,
)
from dllm_trl.trainers.advantages import GroupEstimator, in_accuracy_range, is_overlong
from dllm_trl.trainers.constructor_checks import check_reward_columns
from dllm_trl.types import Round, Rows

from .tiny_rl import (
    EOS_IDS,
    ON_CPU,
    TINY,
    letter_reward,
    make_model,
    make_prompts,
    make_tokenizer,
    rows_of,
    score,
)


ORACLES = Path(os.environ.get("DLLM_TRL_ORACLES", Path(__file__).parents[1] / "fixtures" / "oracles"))


def cases(name):
    return [pytest.param(c, id=c["name"]) for c in json.loads((ORACLES / f"{name}.json").read_text())["cases"]]


def make_trainer(tmp_path, model=None, trainer_class=TraceRLTrainer, reward_funcs=letter_reward, **options):
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 14,
        "remasking_strategy": "low_confidence_static",
        "denoising_steps": 2,
        **ON_CPU,
        **options,
    }
    names = ("objective", "peft_config", "rollouts", "estimator", "value_model")
    other = {name: options.pop(name) for name in names if name in options}
    trainer = trainer_class(
        model=model or make_model(),
        reward_funcs=reward_funcs,
        args=trainer_class.config_class(**options),
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
        **other,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def roll_out(trainer, prompts=(0, 5)):
    rows = [trainer.train_dataset[i] for i in prompts for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def replay(trainer, rows):
    """Log-probabilities one row, round and block at a time (full attention: the whole row), with the model's own
    attention and full logits."""
    model = trainer.model
    block_length = rows.grid.block_length if rows.grid.attention == "block" else None
    result = torch.zeros(rows.canvas_ids.shape)
    times = torch.zeros_like(result)
    for r in trainer.objective.rounds(rows):
        for row in range(len(result)):
            prompt = rows.prompt_ids[row][rows.prompt_mask[row].bool()]
            length = int(rows.canvas_mask[row].sum())
            clean = torch.cat([prompt, rows.canvas_ids[row, :length]])
            masked = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), r.masked[row, :length]])
            scored = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), r.scored[row, :length]])
            for start in range(0, len(clean), block_length or len(clean)):
                block = slice(start, min(start + (block_length or len(clean)), len(clean)))
                if not scored[block].any():
                    continue
                ids = clean[: block.stop].clone()
                ids[block][masked[block]] = trainer.mask_token_id
                with torch.no_grad():
                    logits = model(input_ids=ids[None], block_length=block_length).logits[0]
                logps = (logits / trainer.temperature).log_softmax(-1)
                for position in range(block.start, block.stop):
                    if scored[position]:
                        read = position - model.config.logit_shift
                        result[row, position - len(prompt)] = logps[read, clean[position]]
                        times[row, position - len(prompt)] += 1
    assert torch.equal(times, rows.trained.float())  # every token that counts, once
    return result


@pytest.mark.parametrize("family, block_length", [*((family, 4) for family in TINY), ("sdar", 1), ("sdar", 8)])
@pytest.mark.parametrize("shrink", [1, 2, 100])
def test_scores_are_those_of_the_contexts_of_the_rollout(tmp_path, family, block_length, shrink):
    """
    Trainer = replay block by block to 1e-5; with `shrink=1`, also = what decoding recorded, and the ratio to the old
    policy is 1. Prompts are no multiple of the block, some rows end early, and the temperature is not 1.
    """
    trainer = make_trainer(
        tmp_path,
        make_model(family),
        block_length=block_length,
        denoising_steps=min(block_length, 3),
        shrink=shrink,
        temperature=0.9,
        num_iterations=2,
        num_scored_pads=1,
        seed=2,
    )
    batch = roll_out(trainer, prompts=(0, 5, 9, 14))
    rows = rows_of(trainer, batch)
    lengths = batch["completion_mask"].sum(1)
    assert (lengths < 14).any() and (lengths == 14).any()
    assert (batch["prompt_mask"].sum(1) % 8 != 0).any()
    if block_length > 1:
        assert (rows.trained.sum(1) > lengths).any()  # a token after EOS that counts
        assert (rows.trained.sum(1) < rows.canvas_mask.sum(1)).any()  # and one that does not
    logps, entropies = score(trainer, rows)
    expected, old = replay(trainer, rows), batch["old_logps"][:, 0]
    torch.testing.assert_close(logps.detach(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(old, expected, atol=1e-5, rtol=0)
    ratio = (logps.detach() - old).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    assert ((entropies > 0) == rows.trained).all()
    if shrink == 1:
        recorded = batch["sampling_per_token_logps"] * rows.trained
        torch.testing.assert_close(logps.detach(), recorded, atol=1e-5, rtol=0)
    else:
        assert "sampling_per_token_logps" not in batch


def test_only_scored_tokens_reach_the_head(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = roll_out(trainer)
    seen = []
    trainer.model.base_model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.shape))
    trainer._compute_loss(trainer.model, batch)
    assert seen == [(1, int(rows_of(trainer, batch).trained.sum()), trainer.model.config.hidden_size)]


def test_num_items_and_normaliser_count_scored_tokens(tmp_path):
    """TRL's default loss divides by `num_items_in_batch`: the scored tokens, not the completion mask."""
    trainer = make_trainer(tmp_path, num_scored_pads=None, seed=2)
    batch = roll_out(trainer, prompts=(0, 9))
    trained = rows_of(trainer, batch).trained
    assert batch["num_items_in_batch"] == trained.sum() > batch["completion_mask"].sum()
    loss = trainer._compute_loss(trainer.model, batch)
    expected = -(batch["advantages"][:, None] * trained).sum() / trained.sum()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=0)


def test_a_batch_without_rows_is_an_error(tmp_path):
    """Nobody knows what its responses saw, and another context is not scored in place of it."""
    trainer = make_trainer(tmp_path)
    plain = {name: value for name, value in roll_out(trainer).items() if not name.startswith("rows/")}
    with pytest.raises(ValueError, match="The batch has no rows"):
        trainer._compute_loss(trainer.model, plain)


def test_an_objective_of_ones_own(tmp_path):
    """A function from rows to rounds is an objective. Weights multiply a token's log-probability, per round."""

    def halves(rows):
        trained = rows.trained
        even = torch.arange(trained.size(1)) % 2 == 0
        everything = Round(masked=trained, scored=trained, loss_weight=torch.full(trained.shape, 0.25))
        return [everything, Round(masked=trained & even, scored=trained & even)]

    trainer = make_trainer(tmp_path, trainer_class=DiffusionGRPOTrainer, objective=halves, max_steps=1)
    batch = roll_out(trainer)
    assert "sampling_per_token_logps" not in batch  # a stranger's rounds are not assumed to replay the rollout
    rows = rows_of(trainer, batch)
    logps, entropies = score(trainer, rows)
    first, second = halves(rows)
    parts = []
    for r in (first, second):
        trainer.objective = FunctionObjective(lambda rows, r=r: [Round(r.masked, r.scored)])
        parts.append(score(trainer, rows))
    torch.testing.assert_close(logps, 0.25 * parts[0][0] + parts[1][0])
    times = first.scored.int() + second.scored.int()
    torch.testing.assert_close(entropies, (parts[0][1] + parts[1][1]) / times.clamp(min=1))


PAPER = {"eps": 0.2, "beta": 0.01, "kl": "k3", "policy_norm": "response", "kl_norm": "response"}


def has_a_loss_type(case):
    """TRL has k3 only, and normalises the KL term as it does the policy term."""
    inputs = PAPER | case["inputs"]
    return inputs["beta"] == 0 or (inputs["kl"] == "k3" and inputs["kl_norm"] == inputs["policy_norm"])


@pytest.mark.parametrize("case", [c for c in cases("seed_policy_loss") if has_a_loss_type(c.values[0])])
def test_policy_loss(tmp_path, monkeypatch, case):
    """The paper's loss with KL to the old policy, through TRL's own."""
    inputs, expected = PAPER | case["inputs"], case["expected"]
    scored = torch.tensor(inputs["mask"])
    rows, columns = scored.shape
    trainer = make_trainer(
        tmp_path,
        loss_type={"response": "dr_grpo", "masked": "grpo"}[inputs["policy_norm"]],
        use_bias_correction_kl=False,
        max_completion_length=inputs["response_len"],
        epsilon=inputs["eps"],
        beta=inputs["beta"],
        kl_target="old",
    )
    answer_with(trainer, monkeypatch, torch.tensor(inputs["logp_new"]))
    ids = torch.zeros(rows, columns, dtype=torch.long)
    prompts = torch.zeros(rows, 1, dtype=torch.long)
    responses = Rows(prompts, prompts + 1, ids, ids + 1, trainer.grid, scored, torch.where(scored, 0, -1))
    loss = trainer._compute_loss(
        trainer.model,
        responses.to_batch()
        | {
            "prompt_ids": prompts,
            "prompt_mask": prompts + 1,
            "advantages": torch.tensor(inputs["adv"]),
            "old_logps": torch.tensor(inputs["logp_old"]).unsqueeze(1),
            "num_items_in_batch": scored.sum(),
            "policy_step": torch.tensor(0),
        },
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", cases("seed_policy_loss"))
def test_policy_loss_with_every_estimate_and_norm(case):
    """The same and the cases that no `loss_type` covers, through the loss of DiPO, row by row."""
    inputs = PAPER | case["inputs"]
    names = ("logp_new", "logp_old", "adv", "mask")
    rows = [[torch.tensor(inputs[name][row : row + 1]) for name in names] for row in range(len(inputs["mask"]))]

    def loss(beta, norm):
        values = []
        for new, old, advantages, mask in rows:
            size = {"response": inputs["response_len"], "masked": mask.sum(), "none": 1}[norm]
            clip = (inputs["eps"], inputs["eps"])
            values.append(dipo_loss(new, old, old, advantages, mask, size, *clip, beta, inputs["kl"]))
        return torch.stack(values).mean()

    kl = loss(inputs["beta"], inputs["kl_norm"]) - loss(0.0, inputs["kl_norm"])
    found = loss(0.0, inputs["policy_norm"]) + kl
    assert found.item() == pytest.approx(case["expected"], rel=1e-5)


def answer_with(trainer, monkeypatch, logps):
    """The scorer finds these log-probabilities `(B, R)`, in one round."""

    def scores(model, rows, rounds, **kwargs):
        index = (torch.zeros(logps.numel(), dtype=torch.long), *torch.ones(logps.shape).nonzero().unbind(1))
        values = logps.flatten()
        return Scores(index, (1, *logps.shape), values, torch.zeros_like(values))

    monkeypatch.setattr(trainer, "scorer", scores)


def test_log_ratios_beyond_ten_have_no_gradient(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2)
    batch = roll_out(trainer)
    trained = rows_of(trainer, batch).trained
    far = torch.zeros_like(trained)
    far[:, 0] = True
    batch["old_logps"] = torch.where(far, batch["old_logps"][:, 0] - 30, batch["old_logps"][:, 0]).unsqueeze(1)
    batch["advantages"] = -torch.ones_like(batch["advantages"])  # the side that is not clipped
    seen = {}
    original = trainer.objective.reduce

    def reduce(*args):
        seen["logps"] = original(*args)
        seen["logps"].retain_grad()
        return seen["logps"]

    trainer.objective.reduce = reduce
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite() and loss < torch.e**10
    gradient = seen["logps"].grad
    assert (gradient[far] == 0).all() and (gradient[trained & ~far] != 0).all()


def test_no_slack_means_without_eos():
    overlong = is_overlong(torch.tensor([9, 10, 10]), torch.tensor([False, True, False]), 10, 0)
    assert overlong.tolist() == [False, False, True]


def test_groups_without_a_reward_are_kept():
    rewards = torch.tensor([torch.nan, torch.nan, 1.0, torch.nan, 1.0, 0.0])
    assert in_accuracy_range(rewards, 2, 0.2, 0.8).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("case", "scale_rewards"),
    [
        pytest.param(case.values[0], scale, id=f"{scale}-{case.id}")
        for fixture, scale in (
            ("adv_zscore_population", "population"), ("adv_trl_group", "group"), ("adv_grpo_mean_only", "none"),
        )
        for case in cases(fixture)
    ],
)  # fmt: skip
def test_advantages(tmp_path, case, scale_rewards):
    given = case["inputs"]["xs"]
    size = len(given)
    trainer = make_trainer(
        tmp_path,
        scale_rewards=scale_rewards,
        num_generations=size,
        per_device_train_batch_size=2 * size,
        max_completion_length=2,
        reward_funcs=[
            lambda completions, **kwargs: given + [None] * (size - 1) + [1.0],
            lambda completions, **kwargs: [None] * 2 * size,
        ],
    )
    advantages = roll_out(trainer)["advantages"]
    # Rewards are float32, some of them are 1e-4 apart
    torch.testing.assert_close(advantages[:size], torch.tensor(case["expected"]), rtol=1e-3, atol=1e-6)
    assert (advantages[size:] == 0).all()  # no reward, and nothing to compare the single one with
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages.tolist())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_dropped_groups_leave_the_normaliser(tmp_path, loss_type):
    """The loss and its gradient are those of a batch without the dropped group."""
    rewards = [1.0, 0.0, 0.0, 0.0] + [0.0] * 4
    options = {"loss_type": loss_type, "beta": 0.1, "kl_target": "old", "num_iterations": 2}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    trainer = make_trainer(
        tmp_path, reward_funcs=lambda completions, **kwargs: rewards, accuracy_range=[0.25, 0.75], **options
    )
    batch = roll_out(trainer)
    trained = rows_of(trainer, batch).trained
    assert not trained[4:].any() and trained[:4].any(1).all()
    assert batch["num_items_in_batch"] == trained.sum()
    alone = {name: value[:4] if value.ndim else value for name, value in batch.items() if name != "kept_scale"}
    gradients = []
    for inputs in (batch, alone):
        inputs["old_logps"] = inputs["old_logps"] + 0.1  # so that the KL term has a gradient
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients.append((loss.item(), trainer.model.lm_head.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], atol=1e-6, rtol=1e-4)
    assert gradients[0][1].abs().max() > 1e-4


def test_overlong_responses_are_wrong(tmp_path):
    seen = {}

    def always_right(completion_ids, **kwargs):
        seen["ended"] = torch.tensor([ids[-1] in EOS_IDS for ids in completion_ids])
        seen["lengths"] = torch.tensor([len(ids) for ids in completion_ids])
        return [1.0] * len(completion_ids)

    trainer = make_trainer(tmp_path, reward_funcs=always_right, overlong_slack=0, seed=2)
    rewards = []
    trainer.estimator = lambda outcome: rewards.append(outcome.rewards[:, 0].tolist()) or GroupEstimator()(outcome)
    roll_out(trainer, prompts=(0, 9))
    assert seen["ended"].any() and not seen["ended"].all()
    assert rewards.pop() == seen["ended"].float().tolist()
    trainer.args.overlong_slack = 8
    roll_out(trainer, prompts=(0, 9))
    assert rewards.pop() == (seen["lengths"] < 6).float().tolist()


def test_truncated_responses_are_not_scored(tmp_path):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, num_scored_pads=None, seed=2)
    batch = roll_out(trainer, prompts=(0, 9))
    ended = torch.isin(batch["completion_ids"], torch.tensor(EOS_IDS)).any(1)
    assert ended.any() and not ended.all()
    assert torch.equal(rows_of(trainer, batch).trained.any(1), ended)


@pytest.mark.parametrize("family", TINY)
def test_rollouts_depend_on_the_seed_and_their_place_only(tmp_path, family):
    def rollouts(seed, torch_seed, num_slots=None, prompts=(0, 5)):
        trainer = make_trainer(tmp_path, make_model(family), block_length=4, seed=seed, num_slots=num_slots)
        torch.manual_seed(torch_seed)
        return roll_out(trainer, prompts)

    first, same, other = rollouts(1, 1), rollouts(1, 2, num_slots=3), rollouts(2, 1)
    for name in ("rows/canvas_ids", "rows/step_map"):
        assert torch.equal(first[name], same[name])
    assert not torch.equal(first["rows/canvas_ids"], other["rows/canvas_ids"])
    repeated = rollouts(1, 1, prompts=(5, 5))  # another prompt before, the same place: the same responses
    assert torch.equal(repeated["completion_ids"][4:, :4], first["completion_ids"][4:, :4])
    assert not torch.equal(repeated["rows/canvas_ids"][:4], repeated["rows/canvas_ids"][4:])

    trainer = make_trainer(tmp_path, make_model(family), block_length=4, seed=1)
    trainer._step = trainer.args.steps_per_generation * trainer.num_iterations  # the next generation draws anew
    assert not torch.equal(roll_out(trainer)["rows/canvas_ids"], first["rows/canvas_ids"])


def test_generation_leaves_the_model_as_it_was(tmp_path):
    """Decoding runs without dropout and without checkpointing, and both come back."""
    trainer = make_trainer(tmp_path, make_model(attention_dropout=0.5))
    trainer.model.gradient_checkpointing_enable()
    first = roll_out(trainer)
    assert trainer.model.training and trainer.model.is_gradient_checkpointing
    trainer.model.eval()
    trainer._eval_rows = 0
    roll_out(trainer)
    assert not trainer.model.training
    plain = make_trainer(tmp_path)
    assert torch.equal(roll_out(plain)["rows/canvas_ids"], first["rows/canvas_ids"])


def test_log_probability_method_has_the_arguments_we_know():
    assert list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[:2] == ["self", "model"]
    # All that TRL's loss does with the model is to ask for log-probabilities: scores can stand in its place
    body = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    assert [node.id for node in ast.walk(body) if isinstance(node, ast.Name)].count("model") == 1


def test_config_is_checked(tmp_path):
    for options, message in [
        ({"block_length": 0}, "`block_length`"),
        ({"block_length": -4}, "`block_length`"),
        ({"denoising_steps": 0}, "`denoising_steps`"),
        ({"num_scored_pads": -1}, "`num_scored_pads`"),
        ({"overlong_slack": -1}, "`overlong_slack`"),
        ({"accuracy_range": [0.8, 0.2]}, "`accuracy_range`"),
        ({"accuracy_range": [0.5]}, "`accuracy_range`"),
        ({"kl_target": "new"}, "`kl_target`"),
        ({"on_policy_check": "maybe"}, "`on_policy_check`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"max_completion_length": None}, "`max_completion_length`"),
        ({"kl_target": "old", "beta": 0.1, "sync_ref_model": True}, "`sync_ref_model"),
        ({"scale_rewards": "population", "multi_objective_aggregation": "normalize_then_sum"}, "`scale_rewards"),
        ({"block_size": 4}, "use `block_length`"),
        ({"gen_length": 4}, "use `max_new_tokens`"),
        ({"shrink": 0}, "`shrink`"),
    ]:
        with pytest.raises(ValueError, match=message):
            TraceRLConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    assert DiffusionGRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False).accuracy_range is None


@pytest.mark.parametrize("config", [TraceRLConfig, DiffusionSFTConfig])
def test_on_the_cpu_nothing_is_bfloat16_unless_said(config, tmp_path):
    assert config(str(tmp_path), use_cpu=True).bf16 is False
    assert config(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


def demands_a_column(completions, gold, log_metric, **kwargs):
    return [0.0] * len(completions)


def test_a_column_that_a_reward_demands_is_missed_before_any_rollout(tmp_path):
    with pytest.raises(ValueError, match=r"`demands_a_column` needs \['gold'\], but `train_dataset` has only"):
        make_trainer(tmp_path, reward_funcs=[letter_reward, demands_a_column])
    check_reward_columns(demands_a_column, "train_dataset", Dataset.from_dict({"prompt": ["a"], "gold": ["b"]}))
    with pytest.raises(ValueError, match=r"`eval_dataset\['x'\]`"):
        check_reward_columns(demands_a_column, "eval_dataset", {"x": Dataset.from_dict({"prompt": ["a"]})})


def test_a_bar_shows_the_rollout(tmp_path, capsys, monkeypatch):
    """Rows, tokens per second and per forward, as the rollout counts them; on the main process, and where bars are."""
    shown, step = [], RolloutBar.step
    monkeypatch.setattr(
        RolloutBar, "step", lambda bar, *args, **kwargs: shown.append(bar) or step(bar, *args, **kwargs)
    )
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    rollout = roll_out(trainer)
    bar = shown[-1]
    committed = (rollout["rows/step_map"] >= 0).sum().item()
    assert (bar.total, bar.n, bar.tokens) == (8, 8, committed)
    values, _ = trainer._notes["train"]["decode/tokens_per_forward"]
    assert bar.postfix.endswith(f"{values[-1]:.2f} tokens/forward")
    assert "Rollout" in capsys.readouterr().err

    roll_out(make_trainer(tmp_path, disable_tqdm=True))
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    roll_out(trainer)
    assert "Rollout" not in capsys.readouterr().err


def test_log_ratios_are_bounded_before_trl_sees_them(tmp_path, monkeypatch):
    """rho = exp(clamp(lp - lp_old, -10, 10)), without gradient outside."""
    trainer = make_trainer(tmp_path)
    batch = roll_out(trainer)
    old = torch.zeros(batch["rows/canvas_ids"].shape)
    logps = torch.zeros_like(old)
    logps[0, :3] = torch.tensor([15.0, -15.0, 9.0])
    logps.requires_grad_()
    answer_with(trainer, monkeypatch, logps)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: model.logps)
    monkeypatch.setattr(trainer, "_record_loss", lambda *args: None)
    batch["policy_step"] = torch.tensor(-1)  # other weights: nothing to compare
    seen = trainer._compute_loss(trainer.model, {**batch, "old_logps": old.unsqueeze(1)})
    assert seen[0, :3].tolist() == [10.0, -10.0, 9.0]
    seen.sum().backward()
    assert logps.grad[0, :3].tolist() == [0.0, 0.0, 1.0]
