"""Keeps what is dear to compute and computes the rest again in the backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


# Activations `(tokens, hidden)` of this many numbers and more: below, bookkeeping costs more than the memory is worth.
LARGE = 2**20
# Matrix products and attention. Norms, rotations, gates and the copies of shared keys are cheap to compute again.
KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def keep_products(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """
    Within it, decoder layers keep the results of their matrix products and attention for the backward pass and nothing
    else: about a third of the memory of keeping everything, in about the same time. Numbers are the same to the bit.

    Args:
        layers (`Iterable[GradientCheckpointingLayer]`):
            Decoder layers in training mode whose gradient checkpointing is off.
    """
    function = partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
    )
    layers = list(layers)
    for layer in layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func
