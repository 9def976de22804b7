"""A strategy's parameters stand in its own file, and are arguments by their names wherever decoding is asked for."""

from dataclasses import dataclass, fields

import pytest
import torch
from trl import TrlParser

from dllm_trl import DiffusionGenerationConfig, DiffusionGRPOConfig, TraceRLConfig
from dllm_trl.generation import generate_rollouts
from dllm_trl.generation.samplers import SAMPLERS, parameters, top_quota
from dllm_trl.generation.samplers.low_confidence_dynamic import LowConfidenceDynamic
from dllm_trl.generation.schedules import make_quotas

from ..trainers.tiny_rl import make_model


PROMPT = torch.tensor([[7, 8, 9, 10]])


@dataclass
class Around:
    """The tokens nearest to a column of the block first."""

    center: float = 1.0

    def __post_init__(self):
        if self.center < 0:
            raise ValueError(f"`center` must be at least 0, but is {self.center!r}.")

    def __call__(self, scores, masked, quota):
        columns = torch.arange(masked.size(1), device=masked.device).expand_as(masked)
        return top_quota(-(columns - self.center).abs(), masked, quota)


@pytest.fixture
def around(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "around", Around)


@pytest.fixture(scope="module", params=["sdar", "llada", "Dream"])
def model(request):
    return make_model(request.param).eval()


def test_new_strategy_takes_its_parameter_by_name_at_every_door(model, around, tmp_path):
    given = {"max_new_tokens": 4, "block_length": 4, "denoising_schedule": "even", "eos_token_id": -1}
    given["remasking_strategy"] = "around"

    def steps(config=None, **kwargs):
        output = model.generate(PROMPT, config, return_dict_in_generate=True, **{**given, **kwargs})
        return output.step_map[0].tolist()

    assert steps() == [1, 0, 2, 3]  # its own default
    assert steps(center=2.6) == [3, 2, 1, 0]
    config = DiffusionGenerationConfig(**given, center=2.6)
    assert steps(config) == [3, 2, 1, 0] and steps(config, center=0.0) == [0, 1, 2, 3]
    assert generate_rollouts(model, PROMPT.tolist(), config).step_map[0].tolist() == [3, 2, 1, 0]
    config.save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.remasking_strategy, loaded.center) == ("around", 2.6) and steps(loaded) == [3, 2, 1, 0]
    resolved, unknown = model._resolve_generation_config(config)
    assert (resolved.center, unknown) == (2.6, {})
    assert steps(remasking_strategy=Around(2.6)) == [3, 2, 1, 0]  # an instance where a name is
    for value, message in ((-1.0, "`center` must be at least 0"), ("a", "`center` must be a number")):
        with pytest.raises(ValueError, match=message):
            steps(center=value)
        with pytest.raises(ValueError, match=message):
            DiffusionGenerationConfig(center=value)


def test_parameter_of_no_strategy_is_unknown(model):
    with pytest.raises(ValueError, match="unknown arguments \\['center'\\]"):
        model.generate(PROMPT, max_new_tokens=4, center=1.0)
    with pytest.raises(ValueError, match="unknown arguments \\['center'\\]"):
        DiffusionGenerationConfig(center=1.0)


def test_function_of_ones_own_gets_the_parameters_of_all(model, around):
    seen = {}

    def mine(scores, masked, quota, **kwargs):
        seen.update(kwargs)
        return top_quota(masked.float(), masked, quota)

    model.generate(PROMPT, max_new_tokens=4, remasking_strategy=mine, confidence_threshold=0.3)
    bounds = {"threshold_lower": 0.6, "threshold_upper": 0.9}
    assert seen == {"confidence_threshold": 0.3, "entropy_bound": 0.1, "center": 1.0, **bounds}


def test_of_one_name_in_two_strategies_the_chosen_ones_default_counts(model, monkeypatch):
    @dataclass
    class Careful(LowConfidenceDynamic):
        confidence_threshold: float = 0.99

    monkeypatch.setitem(SAMPLERS, "careful", Careful)

    def threshold(**kwargs):
        return model._resolve_generation_config(None, **kwargs)[0].confidence_threshold

    assert threshold(remasking_strategy="careful") == 0.99
    assert threshold(remasking_strategy="low_confidence_dynamic") == 0.9
    assert threshold(remasking_strategy="careful", confidence_threshold=0.5) == 0.5


@pytest.mark.parametrize("config_class", [DiffusionGRPOConfig, TraceRLConfig])
def test_trainers_and_their_command_line_take_the_parameters(config_class, tmp_path):
    options = [word for name in parameters() for word in (f"--{name}", "0.25")]
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", *options]
    (args,) = TrlParser(config_class).parse_args_and_config(arguments)
    helps = {field.name: field.metadata["help"] for field in fields(config_class) if field.name in parameters()}
    for name, parameter in parameters().items():
        assert (
            getattr(args, name) == 0.25 and getattr(config_class(output_dir=str(tmp_path), use_cpu=True), name) is None
        )
        assert helps[name] == f"{parameter.metadata['help']} `None` takes the checkpoint's, else {parameter.default}."


def test_eps_of_a_published_file_is_that_of_the_dream_schedule():
    model = make_model("Dream").eval()
    model.generation_config = DiffusionGenerationConfig.from_dict({"eps": 0.5, "steps": 4})
    config, _ = model._resolve_generation_config(None, max_new_tokens=16)
    step, masked, width = (torch.tensor([n]).numpy() for n in (0, 16, 16))
    # linspace(1, 0.5, 5) goes to 0.875 in its first step, and 16 (1 - 0.875) = 2; with 1e-3 it would be 3
    assert model._decoding_settings(config).quotas(step, masked, width).tolist() == [2]
    assert make_quotas("dream", 4, {})(step, masked, width).tolist() == [3]
