"""EGSPO against the numbers of the public code, by hand, and in training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_trl.generation.samplers.common import entropy_of
from dllm_trl.objectives.egspo import EGSPOObjective
from dllm_trl.objectives.steps import least_sure_steps, step_advantages, step_loss
from dllm_trl.types import Grid, Rows

from ..trainers.test_tracerl_trainer import logged
from ..trainers.tiny_rl import letter_reward
from .in_training import cases, check_learns, check_ratio_is_one, losses_seen, trainer_of


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def test_entropy(oracles_dir):
    """The public code adds 1e-8 within the logarithm."""
    for inputs, expected, name in cases(oracles_dir, "egspo_entropy"):
        probabilities = torch.tensor(inputs["probs"], dtype=torch.double)
        assert entropy_of(probabilities.log()).item() == pytest.approx(expected, rel=1e-6, abs=2e-8), name


def test_steps(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "egspo_steps"):
        step_map, entropies = torch.tensor([inputs["step_map"]]), torch.tensor([inputs["entropy"]])
        last = step_map.max() if inputs["last_step"] is None else inputs["last_step"]
        assert least_sure_steps(step_map, entropies, step_map <= last, inputs["k"]).tolist() == [expected], name


def test_advantages(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "egspo_advantages"):
        rewards, completed = torch.tensor(inputs["final_rewards"]), torch.tensor(inputs["step_rewards"]).double()
        ours = step_advantages(rewards, completed, inputs["group_size"], inputs["lam"], inputs["normalize"])
        for row, values in zip(ours.tolist(), expected, strict=True):
            assert row == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "egspo_loss"):
        shape = [len(inputs["adv"]), len(inputs["adv"][0])]
        width = max(len(step) for row in inputs["logp_new"] for step in row)

        def padded(values, width=width):
            rows = [[list(step) + [0.0] * (width - len(step)) for step in row] for row in values]
            return torch.tensor(rows, dtype=torch.double).transpose(0, 1)  # (K, B, n)

        scored = padded([[[1.0] * len(step) for step in row] for row in inputs["logp_new"]]) > 0
        logps = (padded(inputs[f"logp_{key}"]) for key in ("new", "old", "ref"))
        worth = torch.tensor(inputs["adv"], dtype=torch.double).T
        assert worth.T.shape == torch.Size(shape)
        clip = (inputs["eps_low"], inputs["eps_high"])
        loss = step_loss(*logps, worth, scored, clip, inputs["beta"], inputs["agg"], inputs["tokens_per_step"])
        assert loss.item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """
    Steps 0, 1, 2 with mean entropies 1, 3 and 2. Of two siblings with rewards 1 and 0 the first would have had 0.5
    without its least sure step, the other has no second step that counts.
    """
    step_map = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 1]])
    entropies = torch.tensor([[1.0, 2.0, 4.0, 2.0], [1.0, 1.0, 1.0, 9.0]])
    trained = torch.tensor([[True] * 4, [True, True, True, False]])
    steps = least_sure_steps(step_map, entropies, trained, 2)
    assert steps.tolist() == [[1, 2], [0, -1]]
    completed = torch.tensor([[0.5, 1.0], [0.0, torch.nan]])
    advantages = step_advantages(torch.tensor([1.0, 0.0]), completed, 2, lam=1.0)
    # (1 + 1 - 0.5) / 2 and 0, and 1/2 for who has no sibling at its place: nothing to compare
    assert advantages.tolist() == [[0.375, 0.0], [-0.375, 0.0]]
    # Ratios 1.1 * 1.05 and 1 for the two steps of one response: sums over tokens, each over their number
    new = torch.tensor([[[0.0, math.log(1.1), math.log(1.05), 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    scored = torch.tensor([[[False, True, True, False]], [[False, False, False, True]]])
    worth, clip = torch.tensor([[2.0], [1.0]]), (0.2, 0.2)
    loss = step_loss(new, torch.zeros_like(new), None, worth, scored, clip, tokens_per_step=scored.sum(-1))
    assert loss.item() == pytest.approx(-(2 * 1.155 / 2 + 1.0) / 2)
    mean = step_loss(new, torch.zeros_like(new), None, worth, scored, clip, agg="mean")
    assert mean.item() == pytest.approx(-(2 * 1.155**0.5 + 1.0) / 2)


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=10), st.integers(1, 8), st.integers(0, 1000))
def test_chosen_steps_are_the_least_sure(steps, count, seed):
    generator = torch.Generator().manual_seed(seed)
    step_map = torch.tensor([steps, steps])
    entropies = torch.rand(step_map.shape, generator=generator)
    trained = (torch.rand(step_map.shape, generator=generator) < 0.7) & (step_map >= 0)
    ones, prompt = torch.ones_like(step_map), torch.ones(2, 1, dtype=torch.long)
    rows = Rows(prompt, prompt, ones, ones, Grid(None, "response"), trained, step_map, entropies=entropies)
    rounds = EGSPOObjective(num_steps=count).rounds(rows)
    assert len(rounds) == count and (sum(r.scored.long() for r in rounds) <= trained.long()).all()
    for row in range(2):
        own = {step: entropies[row][trained[row] & (step_map[row] == step)].mean().item() for step in set(steps)}
        means = sorted((mean for mean in own.values() if mean == mean), reverse=True)
        chosen = [r.scored[row] for r in rounds if r.scored[row].any()]
        found = [entropies[row][one].mean().item() for one in chosen]
        assert found == pytest.approx(means[:count], rel=1e-5)
        for one, r in zip(chosen, rounds, strict=False):
            step = int(step_map[row][one][0])
            assert torch.equal(r.masked[row], step_map[row] >= step)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"lam": -1.0}, {"lam": math.nan}, {"agg": "max"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        EGSPOObjective(**options)


@FAMILIES
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_it_trains(tmp_path, family, lam):
    options = {"num_steps": 3, "lam": lam}
    trainer = check_learns(tmp_path, family, "egspo", objective_kwargs=options, beta=0.04, num_iterations=2)
    assert trainer.objective == EGSPOObjective(**options)


@FAMILIES
def test_the_same_steps_for_old_and_new(tmp_path, family):
    check_ratio_is_one(tmp_path, family, EGSPOObjective(num_steps=3))


def filled_in(trainer, rows, row, step):
    """Text of the canvas before a step, each mask filled with what one forward of this row alone likes best."""
    config = trainer.model.config
    hidden, stop = rows.step_map[row] >= step, int(rows.canvas_mask[row].sum())
    if config.diffusion_attention == "block":
        blocks = rows.blocks[row]
        current = blocks[rows.step_map[row] == step][0]
        hidden, stop = hidden & (blocks == current), int(((blocks <= current) & (rows.canvas_mask[row] > 0)).sum())
    else:
        hidden = hidden | ((rows.step_map[row] < 0) & (rows.canvas_mask[row] > 0))
    prompt = rows.prompt_ids[row][rows.prompt_mask[row] > 0]
    canvas = rows.canvas_ids[row].masked_fill(hidden, trainer.mask_token_id)[:stop]
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.cat([prompt, canvas])[None]).logits[0]
    logits[:, trainer.mask_token_id] = -torch.inf
    places = hidden[:stop].nonzero().flatten()
    canvas[places] = logits[len(prompt) + places - config.logit_shift].argmax(-1)
    ends = [i + 1 for i, token in enumerate(canvas.tolist()) if token in trainer.eos_token_ids]
    return trainer.processing_class.decode(canvas[: min(ends, default=stop)], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["sdar", "llada", "Dream"])
def test_steps_are_worth_what_they_added(tmp_path, family):
    """Reward functions are called once for the responses and once for each step, of which nothing is logged."""
    calls = []

    def watching(completions, tokens_per_forward, log_metric, **kwargs):
        log_metric("calls", len(calls))
        calls.append((completions, letter_reward(completions)))
        return calls[-1][1]

    objective = EGSPOObjective(num_steps=2, lam=1.0)
    options = {"reward_funcs": watching, "max_completion_length": 10, "per_device_train_batch_size": 4}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 0.0, "denoising_steps": 3}
    trainer, seen = trainer_of(tmp_path, family, objective, overlong_slack=0, **options), []
    trainer.estimator = lambda outcome, own=trainer.estimator: seen.append(outcome) or own(outcome)
    trainer.train()
    rows, (outcome,) = seen[0].rows, seen
    assert len(calls) == 3 and logged(trainer, "calls") == [0.0]
    assert len(logged(trainer, "completions/overlong_ratio")) == 1
    steps = least_sure_steps(rows.step_map, rows.entropies, rows.trained, 2)
    assert (steps >= 0).any(0).all() and outcome.completed.shape == (8, 2)
    for row, slots in enumerate(steps.tolist()):
        for (texts, rewards), slot, step in zip(calls[1:], range(2), slots, strict=True):
            if step < 0:
                assert outcome.completed[row, slot].isnan()
                continue
            assert texts[row] == filled_in(trainer, rows, row, step)
            assert outcome.completed[row, slot].item() in (0.0, pytest.approx(rewards[row]))
    assert any(a != b for a, b in zip(calls[0][0], calls[1][0], strict=True))


@FAMILIES
def test_tokens_of_a_step_share_its_advantage(tmp_path, family):
    _, seen = losses_seen(tmp_path, family, EGSPOObjective(num_steps=2, lam=0.5))
    for inputs in seen:
        assert inputs.advantages.shape == inputs.scored.shape and (inputs.advantages[~inputs.scored] == 0).all()
        for one in inputs.rounds:
            for row in range(len(inputs.rows)):
                assert inputs.advantages[row][one.scored[row]].unique().numel() <= 1
    assert any(inputs.advantages.any() for inputs in seen)


def test_completions_have_the_form_of_the_prompts(tmp_path):
    calls = []

    def watching(prompts, completions, **kwargs):
        calls.append((prompts, completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = trainer_of(tmp_path, "sdar", EGSPOObjective(num_steps=1), reward_funcs=watching)
    trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "1+1="}]}] * 4)
    (prompts, completions), (again, filled) = calls
    assert again == prompts and [one[0].keys() for one in filled] == [one[0].keys() for one in completions]
    assert trainer._generation is None
