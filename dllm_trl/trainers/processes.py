"""What several processes of a run do together, and its end."""

import atexit
import os
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator


def most_of(accelerator: Accelerator) -> Callable[[int], int] | None:
    """The largest of a number over all processes; `None` where there is one process."""
    if accelerator.num_processes == 1:
        return None
    return lambda number: int(accelerator.gather(torch.tensor(number, device=accelerator.device)).max())


def end_processes(accelerator: Accelerator) -> None:
    """
    Waits for all processes and leaves their group. The last call of a script: what comes after it may not run.

    With gloo, which connects processes on CPUs, it ends the process, exit hooks included. The interpreter must not be
    taken down first: DDP keeps the group alive, and a thread of gloo that still holds a tensor of its last operation
    then aborts or waits forever ("terminate called without an active exception", torch 2.13).
    """
    connected = torch.distributed.is_initialized()
    gloo = connected and "gloo" in torch.distributed.get_backend_config()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
