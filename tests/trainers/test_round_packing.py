"""Every process runs as many chunks as the one that has most: sharded models gather their weights in step."""

from types import SimpleNamespace

import pytest
import torch

from dllm_trl.trainers.objectives.trace import trace_rounds
from dllm_trl.trainers.round_packing import pack_batch

from .tiny_rl import make_model


@pytest.mark.parametrize(("processes", "most", "expected"), [(1, None, 4), (2, 4, 4), (2, 7, 7)])
def test_processes_have_as_many_chunks(processes, most, expected):
    def gather(count):
        assert processes > 1 and count.item() == 4
        return torch.tensor([count.item(), most])

    accelerator = SimpleNamespace(num_processes=processes, device="cpu", gather=gather)
    trainer = SimpleNamespace(
        _grid=None,
        mask_token_id=2,
        model=make_model("llada"),
        args=SimpleNamespace(rounds_per_forward=1, neftune_noise_alpha=None),
        accelerator=accelerator,
    )
    ids = torch.tensor([[10, 11, 12, 13]])
    batch = {"prompt_ids": ids, "prompt_mask": ids > 0, "canvas_ids": ids, "canvas_mask": ids > 0}
    packed = pack_batch(trainer, batch, trace_rounds(torch.tensor([[0, 1, 2, 3]]), ids > 0))
    assert len(packed.plan.plans) == expected and packed.shape == (4, 1, 4)
