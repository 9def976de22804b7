"""Whole weights for decoding, where training keeps them sharded over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .._compat import idle_fsdp_hooks


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """
    Each process holds all weights of a model that FSDP2 shards, in the type they are computed in.

    Rows end when they like, so processes decode different numbers of forwards, and a forward that gathered its weights
    from the others would wait for one that never comes. They are gathered once, before the first, and until they are
    let go no forward of any part of the model talks to another process. To enter is a collective operation: every
    process must.

    Args:
        model (`torch.nn.Module`):
            The model to decode with, or what wraps it. Without FSDP2 modules in it nothing happens.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in shards:
            module.unshard()
        with idle_fsdp_hooks(shards):
            yield
    finally:
        for module in shards:
            module.reshard()
