"""The reference of the KL term is the policy as it was given, wherever that came from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from trl.trainer.utils import use_adapter

from .._compat import making_reference


def _copied_reference(policy: nn.Module | str):
    """
    Context in which TRL's trainer, while it is built, takes a copy of a policy in memory as its reference model. By
    itself it reads the checkpoint that the policy once came from, which holds other weights, or none. A policy that
    DeepSpeed has partitioned cannot be copied and is read again as in TRL; a path is, too.
    """
    if isinstance(policy, str) or any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        return nullcontext()
    return making_reference(lambda: copy.deepcopy(policy).eval())


@contextmanager
def building_reference(policy: nn.Module | str, args) -> Iterator[None]:
    """
    Context in which TRL's trainer is built: its reference model is a copy of the policy, and with `kl_target="old"`
    there is none, which TRL would load whenever `beta` is not 0.
    """
    beta = args.beta
    if args.kl_target == "old":
        args.beta = 0.0
    try:
        with _copied_reference(policy):
            yield
    finally:
        args.beta = beta


@contextmanager
def reference_of(trainer) -> Iterator[nn.Module]:
    """The reference model, or the policy without its adapter (with the one that it began with) as in TRL."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield trainer.model
