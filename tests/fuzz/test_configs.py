import pytest

from dllm_trl import (
    CoupledGRPOConfig,
    DiffusionGenerationConfig,
    DiffusionSFTConfig,
    RandomMaskGRPOConfig,
    TraceRLConfig,
)
from dllm_trl.generation.configuration import RENAMED

from .doors import INF, NAN, NOT_COUNTS, NOT_INTEGERS, NOT_NUMBERS, judge, options


pytestmark = pytest.mark.slow
WORDS = ["nope", "", "Sequential", 3]


def test_generation_config():
    table = options(
        DiffusionGenerationConfig,
        {
            "block_length": NOT_COUNTS,
            "denoising_steps": NOT_COUNTS,
            "refresh_interval": [-1, *NOT_INTEGERS],
            "confidence_threshold": [-0.1, 1.1, INF, *NOT_NUMBERS],
            "entropy_bound": [-0.1, *NOT_NUMBERS],
            "threshold_lower": [-0.1, 0.95, *NOT_NUMBERS],
            "threshold_upper": [1.1, 0.5, *NOT_NUMBERS],
            "temperature": [-1.0, *NOT_NUMBERS],
            "top_p": [-0.1, 1.1, *NOT_NUMBERS],
            "alg_temp": [-1.0, *NOT_NUMBERS],
            "cfg_scale": [-1.0, *NOT_NUMBERS],
            "remasking_strategy": WORDS,
            "cache": WORDS,
            "denoising_schedule": WORDS,
            "max_new_tokens": [-1, -5],
            "eos_token_id": ["x", [1.5], 2.5, [[1], ["x"]], {}],
            "pad_token_id": ["x", 1.5, {}],
            "suppress_tokens": [["x"], [1.5], "x"],
            "seed": [-1, *NOT_INTEGERS],
            "num_return_sequences": NOT_COUNTS,
            "repetition_penalty": [0, -1.0, *NOT_NUMBERS],
            "min_p": [-0.1, 1.1, *NOT_NUMBERS],
            "max_time": [0, -1.0, *NOT_NUMBERS],
            "suppress_eos": [1, "x", []],
            **{name: [2] for name in RENAMED},
            **{name: [1] for name in ("blok_length", "temprature", "steps_total", "window")},
        },
    )
    judge("DiffusionGenerationConfig", table)


def test_trainer_configs(tmp_path):
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    rl = {
        "block_length": NOT_COUNTS,
        "denoising_steps": NOT_COUNTS,
        "num_slots": NOT_COUNTS,
        "rounds_per_forward": NOT_COUNTS,
        "shrink": NOT_COUNTS,
        "num_scored_pads": [-1, 1.5, NAN, "x"],
        "overlong_slack": [-1, 1.5, NAN, "x"],
        "accuracy_range": [[0.8, 0.2], [0.5], [-1, 1], [0, 2], [NAN, 1], "x"],
        "temperature": [0.0, -1.0, NAN],
        "max_completion_length": [0, -1, None],
        "kl_target": WORDS,
        "on_policy_check": WORDS,
        "scale_rewards": ["popluation", "nope"],
        "value_model": [1.5, "", ["copy"]],
        **{name: [1] for name in ("block_size", "gen_length", "remasking", "threshold", "dynamic_threshold")},
    }
    sft = {
        "block_length": NOT_COUNTS,
        "eos_fill_length": NOT_COUNTS,
        "shrink": NOT_COUNTS,
        "rounds_per_forward": NOT_COUNTS,
        "noise_eps": [0, 1, -1, NAN],
        "noise_max": [2, -1, NAN],
        "cart_p": [0, 2, -1, NAN],
        "loss_norm": WORDS,
        "noise_per": WORDS,
        "weighting": WORDS,
        "max_length": [-1, 0],
        "label_smoothing_factor": [0.1],
    }
    shares = {"lower": [-0.1, 1.1, *NOT_NUMBERS], "upper": [-0.1, 1.1, *NOT_NUMBERS]}
    coupled = {**shares, "estimate": WORDS, "num_iterations": NOT_COUNTS, "scale_rewards": ["leave-one-out"]}
    random_mask = {**shares, "ratios": WORDS, "likelihood": WORDS, "num_masks": NOT_COUNTS}
    random_mask |= {"prompt_mask_prob": [-0.1, 1.1, *NOT_NUMBERS], "objective": WORDS, "estimate": ["pair"]}
    judge("CoupledGRPOConfig", options(lambda **bad: CoupledGRPOConfig(**shared, **bad), coupled))
    judge("RandomMaskGRPOConfig", options(lambda **bad: RandomMaskGRPOConfig(**shared, **bad), random_mask))
    judge("TraceRLConfig", options(lambda **bad: TraceRLConfig(**shared, **bad), rl))
    judge("DiffusionSFTConfig", options(lambda **bad: DiffusionSFTConfig(**shared, **bad), sft))
