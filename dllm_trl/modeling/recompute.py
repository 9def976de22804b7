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


@contextmanager
def without_reentrant(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """
    Within it, decoder layers with gradient checkpointing of the reentrant kind have none. That kind finishes the
    gradient of a parameter in each of its backward passes, so a layer that is called several times before one backward
    pass hands the same gradient several times to those that average gradients over processes (DDP, ZeRO): they refuse.

    Args:
        layers (`Iterable[GradientCheckpointingLayer]`):
            Decoder layers whose computation is itself recomputed in the backward pass.
    """
    off = [
        layer
        for layer in layers
        if layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords.get("use_reentrant")
    ]
    for layer in off:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in off:
            layer.gradient_checkpointing = True
