"""TraceRL with a value model: what it computes, when it learns, and what it leaves alone."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from dllm_trl.modeling.value import ADAPTER_NAME, own_state
from dllm_trl.objectives.random_mask import RandomMaskObjective
from dllm_trl.objectives.trace import TraceObjective, merged_steps
from dllm_trl.trainers import TraceRLConfig, TraceRLTrainer
from dllm_trl.trainers.advantages import GroupEstimator
from dllm_trl.trainers.gae import outcome_token_rewards, step_gae, value_loss

from . import test_diffusion_grpo_trainer, test_tracerl_trainer
from .test_diffusion_grpo_trainer import roll_out
from .test_exact_resume import same
from .test_tracerl_trainer import changed, logged, weights
from .tiny_rl import ON_CPU, TINY, make_model, make_prompts, rows_of


KINDS = pytest.mark.parametrize("family", ["sdar", "llada"])
CRITICS = pytest.mark.parametrize("value_model", ["copy", "adapter"])
FAST = {"value_learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_completion_length": 10}


def make_trainer(tmp_path, model=None, value_model="copy", **options):
    """Ready to train."""
    return test_tracerl_trainer.make_trainer(tmp_path, model, value_model=value_model, **(FAST | options))


def make_still(tmp_path, model=None, value_model="copy", **options):
    """Ready to roll out a batch of two prompts."""
    options = FAST | {"value_learning_rate": 0.0} | options
    return test_diffusion_grpo_trainer.make_trainer(tmp_path, model, value_model=value_model, **options)


def critic_weights(trainer):
    return {name: value.clone() for name, value in own_state(trainer.value_model).items()}


def teach(trainer, seed=0):
    """Gives the critic something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        trainer.value_model.score.weight.normal_(std=0.2, generator=generator)


# ------------------------------------------------------------------------------------------------ what it is worth


# One of each kind at once, all at leisure
EVERY = [(family, kind) for family in TINY for kind in ("copy", "adapter")]
SOON = [("sdar", "copy"), ("Fast_dLLM_Qwen", "adapter"), ("llada", "adapter"), ("Dream", "copy")]


@pytest.mark.parametrize(
    ("family", "value_model"),
    [pytest.param(*one, marks=[] if one in SOON else pytest.mark.slow, id="-".join(one)) for one in EVERY],
)
def test_a_new_critic_changes_nothing_at_first(tmp_path, family, value_model):
    """Its head is zero, so that the first advantages are those without it; then both models learn."""
    plain = roll_out(make_still(tmp_path, make_model(family), None))
    batch = roll_out(still := make_still(tmp_path, make_model(family), value_model))
    rows = rows_of(still, batch)
    assert batch["advantages"].shape == rows.trained.shape
    torch.testing.assert_close(batch["advantages"], plain["advantages"].unsqueeze(1) * rows.trained)
    trainer = make_trainer(tmp_path, make_model(family), value_model)
    before, critic = weights(trainer.model), critic_weights(trainer)
    trainer.train()
    assert changed(trainer, before)
    now = critic_weights(trainer)
    moved = {name for name in now if not torch.equal(now[name], critic[name])}
    assert "score.weight" in moved and len(moved) > 4
    assert len(logged(trainer, "value/loss")) == 2 and len(logged(trainer, "value/explained_variance")) == 2
    variances = [logged(trainer, f"value/advantage_variance{name}") for name in ("", "_without")]
    assert variances[0][0] == pytest.approx(variances[1][0])


def read_values(trainer, rows):
    """Values token by token: a row without padding, a forward of its own for the token's step."""
    critic, grid = trainer.value_model.eval(), trainer.grid
    shift = trainer.model.config.logit_shift
    values = torch.zeros(rows.canvas_ids.shape)
    for b, column in rows.trained.nonzero().tolist():
        prompt = rows.prompt_ids[b][rows.prompt_mask[b].bool()]
        exists = rows.canvas_mask[b].bool()
        canvas = rows.canvas_ids[b][exists]
        masked = (rows.step_map[b] >= rows.step_map[b, column])[exists]
        if grid.attention == "block":  # up to the end of the token's block; earlier ones are clean
            block = rows.blocks[b][exists]
            end = int((block <= block[column]).sum())
            canvas, masked = canvas[:end], (masked & (block == block[column]))[:end]
        ids = torch.cat([prompt, canvas.masked_fill(masked, trainer.mask_token_id)])[None]
        with torch.no_grad():
            values[b, column] = critic(ids).logits[0, len(prompt) + column - shift, 0]
    return values


@pytest.mark.parametrize("family", ["sdar", "Fast_dLLM_Qwen", "llada", "Dream"])
def test_values_are_read_where_tokens_are_scored(tmp_path, family):
    trainer = make_still(tmp_path, make_model(family), gae_lambda=0.7, gamma=0.9, num_scored_pads=None)
    teach(trainer)
    batch = roll_out(trainer)
    rows = rows_of(trainer, batch)
    values = read_values(trainer, rows)
    assert values[rows.trained].std() > 0.05
    torch.testing.assert_close(trainer.estimator._old_values(rows), values, atol=1e-5, rtol=1e-4)
    # The advantages are those of the formula, with the plain advantage of the response on its last step
    plain = make_still(tmp_path, make_model(family), value_model=None, num_scored_pads=None)
    worth = roll_out(plain)["advantages"]
    rewards = outcome_token_rewards(worth, rows.step_map, rows.trained)
    expected = step_gae(rows.step_map, rows.trained, rewards, values, 0.9, 0.7)
    torch.testing.assert_close(batch["advantages"], expected.advantages, atol=1e-4, rtol=1e-4)


@KINDS
def test_rewards_on_tokens(tmp_path, family):
    trainer = make_still(tmp_path, make_model(family), gamma=0.9)
    teach(trainer)
    seen = []
    estimator, given = trainer.estimator, torch.randn(8, 10)

    def with_rewards(outcome):
        outcome.token_rewards = given[:, : outcome.rows.trained.size(1)]
        seen.append(outcome)
        return estimator(outcome)

    trainer.estimator = with_rewards
    batch = roll_out(trainer)
    rows = rows_of(trainer, batch)
    rewards = seen[0].token_rewards + outcome_token_rewards(seen[0].advantages, rows.step_map, rows.trained)
    expected = step_gae(rows.step_map, rows.trained, rewards, seen[0].values, 0.9, 1.0).advantages
    torch.testing.assert_close(batch["advantages"], expected)


@KINDS
def test_shrink_merges_steps(tmp_path, family):
    trainer = make_still(tmp_path, make_model(family), shrink=2, denoising_steps=4, block_length=4)
    rows = rows_of(trainer, roll_out(trainer))
    assert torch.equal(merged_steps(rows, TraceObjective().rounds(rows)), rows.step_map.masked_fill(~rows.trained, -1))
    found = merged_steps(rows, trainer.objective.rounds(rows))
    blocks = rows.blocks if family == "sdar" else torch.zeros_like(rows.step_map)
    for b in range(len(rows)):
        for block in blocks[b].unique():
            inside = (blocks[b] == block) & (rows.step_map[b] >= 0)
            steps = rows.step_map[b][inside].unique().tolist()
            largest = {step: steps[min(i // 2 * 2 + 1, len(steps) - 1)] for i, step in enumerate(steps)}
            for column in (inside & rows.trained[b]).nonzero().flatten().tolist():
                # Of a group the largest that somebody trains: later tokens may lie behind EOS
                assert rows.step_map[b, column] <= found[b, column] <= largest[int(rows.step_map[b, column])]
    assert (found[rows.trained] != rows.step_map[rows.trained]).any()


# ---------------------------------------------------------------------------------------------------- when it learns


@KINDS
def test_one_update(tmp_path, family):
    """One step of AdamW on the clipped loss over all scored tokens, whatever the size of micro-batches."""
    found = []
    for size, steps in ((8, 1), (2, 4), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(tmp_path, make_model(family), learning_rate=0.0, max_grad_norm=0.05, **options)
        teach(trainer)
        trainer.train()
        found.append(critic_weights(trainer))
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], weight, atol=2e-5, rtol=1e-4)


@KINDS
def test_the_loss(tmp_path, family):
    trainer = make_trainer(tmp_path, make_model(family), max_steps=1, max_grad_norm=0.0, value_clip=0.05)
    teach(trainer)
    twin, calls = copy.deepcopy(trainer.value_model), []
    update = trainer.estimator._update

    def watched(rows, old_values, returns):
        calls.append((rows, old_values + 0.1, returns))
        update(*calls[-1])

    trainer.estimator._update = watched
    gradients = []  # AdamW hides by how much they are off
    trainer.estimator.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(parameter.grad.clone() for parameter in trainer.estimator.parameters)
    )
    trainer.train()
    (rows, old_values, returns), other = calls[0], make_still(tmp_path, make_model(family), value_model=twin)
    values = other.estimator._values(rows)
    loss = value_loss(values, old_values, returns, rows.trained, epsilon=0.05)
    assert logged(trainer, "value/loss") == [pytest.approx(loss.item(), rel=1e-4)]
    optimizer = torch.optim.AdamW(other.estimator.parameters, lr=1e-2, weight_decay=0.0)
    loss.backward()
    for found, parameter in zip(gradients, other.estimator.parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-3)
    optimizer.step()
    for name, weight in critic_weights(trainer).items():
        torch.testing.assert_close(critic_weights(other)[name], weight, atol=5e-4, rtol=1e-3)


def test_it_learns_before_the_policy_and_after_the_advantages(tmp_path):
    trainer, events = make_trainer(tmp_path, max_steps=2), []
    names = {"_old_values": trainer.estimator, "_update": trainer.estimator, "_compute_loss": trainer}

    def watch(name, method):
        return lambda *args: (events.append(name), method(*args))[1]

    for name, owner in names.items():
        setattr(owner, name, watch(name, getattr(owner, name)))
    trainer.train()
    assert events == [*names] * 2


@CRITICS
def test_updates_follow_the_policys(tmp_path, value_model):
    """As many in an epoch as the policy takes, every other rollout, on a schedule of their own."""
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    options |= {"num_iterations": 2, "max_steps": 12, "value_update_every": 2, "value_epochs": 3}
    options |= {"value_lr_scheduler_type": "linear", "value_lr_warmup_steps": 2}
    trainer, sizes = make_trainer(tmp_path, None, value_model, **options), []
    update = trainer.estimator._update
    trainer.estimator._update = lambda rows, *rest: (sizes.append(len(rows)), update(rows, *rest))
    trainer.train()
    # 3 rollouts, of which the critic learns from 2; 2 updates in each of 3 epochs
    assert sizes == [8] * 12
    assert trainer.estimator.scheduler.last_epoch == 12 and trainer.estimator.scheduler.get_last_lr() == [0.0]


def test_warmup_leaves_the_policy_alone(tmp_path):
    options = {"value_warmup_updates": 2, "weight_decay": 0.1, "beta": 0.1}
    trainer, before = make_trainer(tmp_path, max_steps=2, **options), None
    before, critic = weights(trainer.model), critic_weights(trainer)
    trainer.train()
    assert not changed(trainer, before) and not same(critic, critic_weights(trainer))
    trainer = make_trainer(tmp_path, max_steps=3, **options)
    trainer.train()
    assert changed(trainer, before)
    with pytest.raises(ValueError, match="there is no critic to warm up"):
        make_trainer(tmp_path, value_model=None, value_warmup_updates=2)


def test_an_evaluation_teaches_nothing(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_prompts(4), per_device_eval_batch_size=4)
    critic = critic_weights(trainer)
    metrics = trainer.evaluate()
    assert same(critic, critic_weights(trainer)) and metrics["eval_value/advantage_variance"] > 0
    assert not any(name.startswith("eval_value/loss") for name in metrics)


def test_dropped_groups_teach_nothing(tmp_path):
    """The first reward is 0 for the one group, and right half of the time in the other."""

    def rewards(prompts, **kwargs):
        return [float(prompt == prompts[0] and i % 2) for i, prompt in enumerate(prompts)]

    trainer = make_trainer(
        tmp_path, accuracy_range=[0.2, 0.8], reward_funcs=rewards, max_steps=1, scale_rewards="population"
    )
    seen, update = [], trainer.estimator._update
    trainer.estimator._update = lambda rows, *rest: (seen.append(rows), update(rows, *rest))
    trainer.train()
    assert seen[0].trained.any(1).tolist() == [True] * 4 + [False] * 4
    critic = critic_weights(trainer)
    trainer.estimator._update(replace(seen[0], trained=torch.zeros_like(seen[0].trained)), *[seen[0].trained] * 2)
    assert same(critic, critic_weights(trainer))


# ------------------------------------------------------------------------------------------------ what it leaves alone


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@KINDS
def test_the_adapter_acts_in_the_critic_alone(tmp_path, family, lora):
    peft = pytest.importorskip("peft")
    options = {"gradient_checkpointing": True, "max_steps": 3, "learning_rate": 1e-3}
    if lora:
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, make_model(family), "adapter", **options)
    names = [*trainer.model.state_dict()]
    trainer.train()
    assert [*trainer.model.state_dict()] == names
    assert not any(f".{ADAPTER_NAME}." in name for name in names)
    assert (trainer.value_model.score.weight != 0).any()
    # On-policy to the last bit that float32 has: neither rollout nor scores have heard of it
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    trainer.save_model()
    if lora:
        saved = peft.PeftModel.from_pretrained(make_model(family), tmp_path)
    else:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(6, 18)[None]
    torch.testing.assert_close(saved.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "value_model")
    torch.testing.assert_close(critic(ids).logits, trainer.value_model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["module", "path"])
def test_a_critic_goes_on_in_another_run(tmp_path, kind):
    first = make_trainer(tmp_path)
    first.train()
    first.save_model()
    folder = tmp_path / "value_model"
    given = AutoModelForTokenClassification.from_pretrained(folder) if kind == "module" else str(folder)
    second = TraceRLTrainer(
        model=make_model(),
        reward_funcs=test_tracerl_trainer.letter_reward,
        args=test_tracerl_trainer.make_args(tmp_path / "second", **FAST),
        train_dataset=make_prompts(),
        processing_class=test_tracerl_trainer.make_tokenizer(),
        value_model=given,
    )
    assert same(critic_weights(first), critic_weights(second))
    second.train()
    assert not same(critic_weights(first), critic_weights(second))


# ---------------------------------------------------------------------------------------------------------- resuming


@CRITICS
def test_a_resumed_run_ends_with_the_same_models(tmp_path, value_model):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    options |= {"value_lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path / "a", None, value_model, **options)
    whole.train()
    for step in (1, 2):  # in the middle of a rollout, and between two
        resumed = make_trainer(tmp_path / "b", make_model(seed=step), value_model, **options)
        teach(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same(weights(whole.model), weights(resumed.model))
        assert same(critic_weights(whole), critic_weights(resumed))
    (tmp_path / "a" / "checkpoint-2" / "value_model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-2 is not a whole checkpoint: `value_model.pt`"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    other = make_trainer(tmp_path / "c", None, "adapter" if value_model == "copy" else "copy", **options)
    with pytest.raises(ValueError, match="is another one than `value_model` gives now"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_model": 3}, "`value_model` must be"),
        ({"value_model": ""}, "`value_model` must be"),
        ({"gamma": 1.5}, "`gamma` must lie in"),
        ({"gae_lambda": -0.1}, "`gae_lambda` must lie in"),
        ({"value_clip": 0.0}, "`value_clip` must be above 0"),
        ({"value_loss_norm": "row"}, "`value_loss_norm` must be one of"),
        ({"value_learning_rate": -1.0}, "`value_learning_rate` must be"),
        ({"value_lr_scheduler_type": "greedy"}, "`value_lr_scheduler_type` must be one of"),
        ({"value_lr_warmup_steps": 3}, "constant_with_warmup"),
        ({"value_lora_rank": 0}, "`value_lora_rank` must be"),
        ({"value_epochs": 0}, "`value_epochs` must be"),
        ({"value_update_every": 0}, "`value_update_every` must be"),
        ({"value_warmup_updates": -1}, "`value_warmup_updates` must be"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TraceRLConfig(str(tmp_path), **ON_CPU, **options)


def test_true_is_a_copy(tmp_path):
    assert TraceRLConfig(str(tmp_path), **ON_CPU, value_model=True).value_model == "copy"
    assert TraceRLConfig(str(tmp_path), **ON_CPU, value_model=False).value_model is None


def test_what_does_not_go_with_it(tmp_path):
    with pytest.raises(ValueError, match="`objective` is a `RandomMaskObjective`"):
        make_still(tmp_path, make_model("llada"), objective=RandomMaskObjective())
    with pytest.raises(ValueError, match="either `value_model` or `estimator`"):
        make_still(tmp_path, estimator=lambda outcome: GroupEstimator()(outcome))
    with pytest.raises(ValueError, match="has full attention, but the policy has block attention"):
        make_still(tmp_path, value_model=str(saved(tmp_path / "llada", "llada")))


def test_a_critic_of_two_labels(tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "policy", num_labels=2)
    with pytest.raises(ValueError, match="gives 2. Load it with `num_labels=1`"):
        roll_out(make_still(tmp_path, value_model=critic))


def saved(folder, family):
    make_model(family).save_pretrained(folder)
    return folder
