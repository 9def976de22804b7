"""What is masked, what is scored, and what becomes of it: one objective per file; one line here names it."""

from collections.abc import Callable
from dataclasses import fields

from .agrpo import AGRPOObjective
from .ar import AutoregressiveObjective
from .base import FunctionObjective, LossInputs, LossOutputs, Objective, Outcome, Random, any_scored, make_objective
from .bgpo import BGPOObjective
from .block_mask import BlockObjective
from .block_reveal import BlockRevealObjective
from .coupled import CoupledObjective
from .diffu_grpo import DiffuGRPOObjective
from .dipo import DiPOObjective
from .ebpo import EBPOObjective
from .egspo import EGSPOObjective
from .espo import ESPOObjective
from .gdpo import GDPOObjective
from .just_grpo import JustGRPOObjective
from .lightning_rl import LightningRLObjective
from .random_mask import RandomMaskObjective
from .semi_ar import SemiAutoregressiveObjective
from .spg import SPGObjective
from .stable_drl import StableDRLObjective
from .trace import TraceObjective
from .unigrpo import UniGRPOObjective
from .wd1 import WD1Objective


# Reinforcement learning
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "agrpo": AGRPOObjective,
    "bgpo": BGPOObjective,
    "block_reveal": BlockRevealObjective,
    "coupled": CoupledObjective,
    "diffu_grpo": DiffuGRPOObjective,
    "dipo": DiPOObjective,
    "ebpo": EBPOObjective,
    "egspo": EGSPOObjective,
    "espo": ESPOObjective,
    "gdpo": GDPOObjective,
    "just_grpo": JustGRPOObjective,
    "lightning_rl": LightningRLObjective,
    "random_mask": UniGRPOObjective,
    "spg": SPGObjective,
    "stable_drl": StableDRLObjective,
    "trace": TraceObjective,
    "wd1": WD1Objective,
}
# Supervised fine-tuning, and what it does by default for each kind of attention
SFT_OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "ar": AutoregressiveObjective,
    "block": BlockObjective,
    "random_mask": RandomMaskObjective,
    "semi_ar": SemiAutoregressiveObjective,
    "trace": TraceObjective,
}
DEFAULT_SFT_OBJECTIVES = {"block": "block", "full": "random_mask"}


def make_rl_objective(objective, num_iterations: int = 1, **options) -> Objective:
    """
    The objective of reinforcement learning that `objective` stands for (see [`make_objective`]), built with `options`.
    One whose views are drawn at random has by default one for each of the `num_iterations` updates on a rollout.
    """
    kind = OBJECTIVES.get(objective) if isinstance(objective, str) else None
    if kind is not None and "num_views" in {f.name for f in fields(kind)}:
        options = {"num_views": num_iterations} | options
    return make_objective(objective, OBJECTIVES, **options)


def name_of(objective: Objective) -> str | None:
    """The name that an objective of reinforcement learning has in [`OBJECTIVES`], if any."""
    return next((name for name, kind in OBJECTIVES.items() if kind is type(objective)), None)


def make_sft_objective(objective, attention: str | None = None, **options) -> Objective:
    """
    The objective of fine-tuning that `objective` stands for (see [`make_objective`]), built with those of `options`
    that it has. `attention` is the model's kind, which the objective must be for; `None` as objective is the kind's
    default.
    """
    chosen, own = DEFAULT_SFT_OBJECTIVES[attention] if objective is None else objective, {}
    if isinstance(chosen, str) and chosen in SFT_OBJECTIVES:
        own = {f.name: options[f.name] for f in fields(SFT_OBJECTIVES[chosen]) if f.name in options}
        if chosen == "semi_ar" and own.get("block_length") is None:
            raise ValueError("`objective='semi_ar'` needs `block_length`, the tokens of a slice, e.g. 32.")
    made = make_objective(chosen, SFT_OBJECTIVES, **own)
    if attention is not None and attention not in made.attentions:
        fitting = [name for name, kind in SFT_OBJECTIVES.items() if attention in kind.attentions]
        raise ValueError(
            f"`objective={objective!r}` is for models with {' or '.join(made.attentions)} attention, but `model` has "
            f"{attention} attention. Use one of {fitting}."
        )
    return made


__all__ = [
    "DEFAULT_SFT_OBJECTIVES",
    "OBJECTIVES",
    "SFT_OBJECTIVES",
    "FunctionObjective",
    "LossInputs",
    "LossOutputs",
    "Objective",
    "Outcome",
    "Random",
    "any_scored",
    "make_objective",
    "make_rl_objective",
    "make_sft_objective",
    "name_of",
]
