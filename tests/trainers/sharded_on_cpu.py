"""Lets accelerate shard models over processes on CPUs."""

import torch
from accelerate import DistributedType, PartialState


def shard_on_cpu() -> None:
    """
    accelerate prepares FSDP and DeepSpeed only for the kinds of processes that have accelerators. To it, those of this
    script are of such a kind, with gloo between them; all else is left as it is.
    """

    def prepare_backend(self, *args, **kwargs):
        return "gloo", DistributedType.MULTI_XPU

    def set_device(self):
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device
