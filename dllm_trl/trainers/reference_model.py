"""The reference of the KL term is the policy as it was given, wherever that came from."""

import copy
from contextlib import nullcontext

from torch import nn

from .._compat import making_reference


def copied_reference(policy: nn.Module | str):
    """
    Context in which TRL's trainer, while it is built, takes a copy of a policy in memory as its reference model. By
    itself it reads the checkpoint that the policy once came from, which holds other weights, or none. A policy that
    DeepSpeed has partitioned cannot be copied and is read again as in TRL; a path is, too.
    """
    if isinstance(policy, str) or any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        return nullcontext()
    return making_reference(lambda: copy.deepcopy(policy).eval())
