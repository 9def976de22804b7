"""
Memory of a TraceRL step with full attention as the number of rounds grows: rounds one after another, each computed
again in the backward pass (ours, `rounds_per_forward=1`, without and with gradient checkpointing), against all rounds
in one forward. Same weights, same step maps; log-probabilities of all sides are compared.

    python benchmarks/rounds_memory.py                                              # 4, 16 and 64 rounds
    python benchmarks/rounds_memory.py --output benchmarks/results/rounds_memory.json

Memory is measured in a process per figure: the peak of its resident set during forward and backward, less its resident
set just before, when weights and gradient buffers are already there. There malloc returns every freed tensor at once
(MALLOC_MMAP_THRESHOLD_), so that the peak is what was in use, not what the allocator kept. Time is wall-clock, one
thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import set_seed

from dllm_trl.modeling.llada import LLaDAConfig, LLaDAModelLM
from dllm_trl.objectives.trace import trace_rounds
from dllm_trl.scoring.layout import pack_rounds
from dllm_trl.types import Grid, Rows


ROUNDS = (4, 16, 64)
SIDES = {"ours": (1, False), "ours, gradient checkpointing": (1, True), "one forward": (None, False)}


def make_model(args: argparse.Namespace) -> LLaDAModelLM:
    set_seed(0)
    config = LLaDAConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        mask_token_id=args.vocab - 1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LLaDAModelLM(config).train()


def make_rows(args: argparse.Namespace, rounds: int):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, args.vocab - 1, (args.rows, args.prompt), generator=generator)
    canvases = torch.randint(1, args.vocab - 1, (args.rows, args.response), generator=generator)
    steps = torch.rand(args.rows, args.response, generator=generator).argsort(-1) * rounds // args.response
    return prompts, torch.ones_like(prompts), canvases, torch.ones_like(canvases), steps


def run_step(model: LLaDAModelLM, rows: tuple, rounds_per_forward: int | None, mask: int) -> torch.Tensor:
    *tokens, steps = rows
    rounds = trace_rounds(steps, steps >= 0)
    packed = pack_rounds(
        Rows(*tokens, Grid(None, "response")), rounds, mask_token_id=mask, rounds_per_forward=rounds_per_forward
    )
    logits = model(
        packed.input_ids, position_ids=packed.position_ids, plan=packed.plan, score_index=packed.score_index
    ).logits[0]
    logps = packed.scatter(logits.log_softmax(-1).gather(-1, packed.labels[:, None])[:, 0]).sum(0)
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).mean().backward()
    return logps.detach()


def resident(kind: str) -> int:
    """Bytes of this process's resident set now (`VmRSS`) or at its peak (`VmHWM`), from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def measure(side: str, rounds: int, args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    model = make_model(args)
    per_forward, checkpointing = SIDES[side]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # zeros_like would not touch its pages yet
    run_step(model, tuple(x[:1, :8] for x in make_rows(args, 2)), per_forward, args.vocab - 1)  # what is made once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    logps = run_step(model, make_rows(args, rounds), per_forward, args.vocab - 1)
    seconds = time.perf_counter() - start
    return {
        "side": side,
        "rounds": rounds,
        "peak_memory_mib": (resident("VmHWM") - before) / 2**20,
        "seconds": seconds,
        "logps": logps.flatten().tolist(),
    }


def in_subprocess(side: str, rounds: int) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", side, str(rounds)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4), ("prompt", 32), ("response", 64), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]), args)))
        return

    results = []
    for rounds in ROUNDS:
        rows = [in_subprocess(side, rounds) for side in SIDES]
        expected = torch.tensor(rows[-1]["logps"])
        for row in rows:
            row["logps_difference"] = (torch.tensor(row.pop("logps")) - expected).abs().max().item()
            results.append(row)
            print(
                f"{row['rounds']:3d} rounds  {row['side']:30s} {row['peak_memory_mib']:7.0f} MiB "
                f"{row['seconds']:6.2f} s  |d log-prob| {row['logps_difference']:.1e}",
                flush=True,
            )
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "measure")}
        settings["torch"] = torch.__version__
        args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
