"""
One TraceRL step (forward and backward through TRL's GRPO loss): our packed rounds against one dense row per response
and round, written here: `[prompt | clean | noisy]` under a boolean mask with full logits, in micro-batches of 1, 2 and
8 rows. Same weights, same step maps, all sides in one run, one thread.

    python benchmarks/train_step.py                                                  # the whole table, minutes
    python benchmarks/train_step.py --output benchmarks/results/train_step.json
    python benchmarks/train_step.py --prompt 32 --response 32 --vocab 2000           # a quick look

Memory is measured in a process per side: the peak of its resident set during the step, less its resident set just
before, when weights and gradient buffers are already there. There malloc returns every freed tensor at once
(MALLOC_MMAP_THRESHOLD_), so that the peak is what was in use, not what the allocator kept.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import selective_log_softmax

from dllm_trl._compat import use_small_logprob_tiles
from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM
from dllm_trl.objectives.trace import trace_rounds
from dllm_trl.scoring.layout import pack_rounds
from dllm_trl.types import Grid, Rows


MICRO_BATCHES = (1, 2, 8)


@dataclass
class Side:
    """One way to run the step, forward and backward."""

    name: str
    run: Callable  # (trainer, batch, model) -> log-probs (B, R), tokens
    checkpointing: bool = False


def build_model(args: argparse.Namespace) -> SDARForCausalLM:
    set_seed(0)
    config = SDARConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        block_size=args.block,
        mask_token_id=args.vocab - 1,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return SDARForCausalLM(config)


class Trainer(GRPOTrainer):
    """TRL's trainer with its own loss; `score` says how the log-probs come about."""

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        return *self.score(model), None


def build_trainer(model: SDARForCausalLM, directory: str, checkpointing: bool) -> Trainer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="a",
    )
    trainer = Trainer(
        model=model,
        args=GRPOConfig(
            directory,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=64,
            loss_type="dapo",
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def build_batch(args: argparse.Namespace, model: SDARForCausalLM) -> dict:
    """8 responses of one prompt, 2 to 4 denoising steps per block, and what TRL's loss needs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, high: int = args.vocab - 1, low: int = 1) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    responses, length, block = args.responses, args.response, args.block
    num_blocks = length // block
    steps = draw(responses, num_blocks, 1, low=min(2, block), high=block + 1)
    # Every step commits a token: a random permutation of the block, cut into `steps` shares.
    rank = torch.rand(responses, num_blocks, block, generator=generator).argsort(-1)
    step_map = (torch.where(rank < steps, rank, rank % steps) + block * torch.arange(num_blocks)[:, None]).flatten(1)
    canvas = draw(responses, length)
    ones = torch.ones_like(canvas)
    prompt_mask = torch.ones(responses, args.prompt, dtype=torch.long)
    rounds = trace_rounds(step_map, ones.bool(), blocks=Grid(block).canvas_blocks(prompt_mask, length))
    batch = {
        "prompt_ids": draw(1, args.prompt).expand(responses, -1),
        "prompt_mask": prompt_mask,
        "completion_ids": canvas,
        "completion_mask": ones,
        "advantages": torch.randn(responses, generator=generator),
        "num_items_in_batch": ones.sum().float(),
        "rounds": rounds,
    }
    # Old log-probs near the policy's, so that ratios differ from 1 and some of them are clipped.
    model.eval()
    with torch.no_grad():
        logps = packed(share_prompts=True)(None, batch, model, only_score=True)
    batch["old_per_token_logps"] = logps + 0.1 * torch.randn(logps.shape, generator=generator)
    model.train()
    return batch


def packed(share_prompts: bool) -> Callable:
    """Ours: every round of every response in one forward, the head at scored positions only."""

    def run(trainer: Trainer | None, batch: dict, model: SDARForCausalLM, only_score: bool = False):
        def score(model):
            layout = pack_rounds(
                Rows(
                    batch["prompt_ids"],
                    batch["prompt_mask"],
                    batch["completion_ids"],
                    batch["completion_mask"],
                    Grid(model.config.block_size),
                ),
                batch["rounds"],
                mask_token_id=model.config.mask_token_id,
                share_prompts=share_prompts,
            )
            tokens["forwarded"], tokens["head"] = layout.input_ids.numel(), len(layout.labels)
            inputs = {
                "input_ids": layout.input_ids,
                "position_ids": layout.position_ids,
                "plan": layout.plan,
                "score_index": layout.score_index,
            }
            if trainer is None:
                logits = model(**inputs).logits[0]
                return layout.scatter(selective_log_softmax(logits, layout.labels)).sum(0), None
            output = model(**inputs, shift_labels=layout.labels[None], fused_lm_head=True)
            logps, entropies = (layout.scatter(x[0]).sum(0) for x in (output.log_probs, output.entropy))
            recorded.append(logps.detach())
            return logps, entropies

        tokens, recorded = {}, []
        if only_score:
            return score(model)[0]
        trainer.score = score
        trainer._compute_loss(model, batch).backward()
        return recorded[0], tokens

    return run


def row_per_round(micro_batch: int) -> Callable:
    """The plain way: a row per response and round, dense mask, full logits, a backward pass per micro-batch."""

    def run(trainer: Trainer, batch: dict, model: SDARForCausalLM):
        prompt, canvas, rounds = batch["prompt_ids"], batch["completion_ids"], batch["rounds"]
        (count, width), length = canvas.shape, prompt.size(1)
        block, mask_id = model.config.block_size, model.config.mask_token_id
        first = length // block * block  # the noisy part begins with the prompt's remainder
        position = torch.cat([torch.arange(length + width), torch.arange(first, length + width)])
        noisy = torch.arange(len(position)) >= length + width
        grid = position // block
        before, same = grid[None] < grid[:, None], grid[None] == grid[:, None]
        # Clean keys of earlier blocks, and of the own block for clean queries; noisy keys of the own block.
        visible = torch.where(noisy[None], same & noisy[:, None], before | (same & ~noisy[:, None]))
        rows = [(r, b) for r in range(len(rounds)) for b in range(count) if rounds[r].scored[b].any()]
        result, tokens = torch.zeros(canvas.shape), {"forwarded": 0, "head": 0}
        for start in range(0, len(rows), micro_batch):
            which = rows[start : start + micro_batch]
            b = torch.tensor([b for _, b in which])
            masked = torch.stack([rounds[r].masked[b] for r, b in which])
            scored = torch.stack([rounds[r].scored[b] for r, b in which])
            ids = torch.cat([prompt[b], canvas[b], prompt[b, first:], canvas[b].masked_fill(masked, mask_id)], 1)

            def score(model):
                logits = model(
                    input_ids=ids,  # noqa: B023 (called within this iteration)
                    position_ids=position.expand(len(ids), -1),  # noqa: B023
                    attention_mask=visible[None, None].expand(len(ids), -1, -1, -1),  # noqa: B023
                ).logits
                logps = selective_log_softmax(logits[:, -width:], canvas[b])  # noqa: B023
                return logps, torch.zeros_like(logps)  # ours computes the entropies TRL logs, this side is let off

            def recorded(model):
                out = score(model)  # noqa: B023
                result[b] += out[0].detach() * scored  # noqa: B023
                return out

            tokens["forwarded"] += ids.numel()
            tokens["head"] += ids.numel()
            part = {k: v[b] for k, v in batch.items() if torch.is_tensor(v) and v.dim()}
            part |= {"completion_mask": scored.long(), "num_items_in_batch": batch["num_items_in_batch"]}
            trainer.score = recorded
            trainer._compute_loss(model, part).backward()
        return result, tokens

    return run


def sides() -> dict[str, Side]:
    table = [
        Side("packed", packed(share_prompts=True)),
        Side("packed, checkpointing", packed(share_prompts=True), checkpointing=True),
        Side("packed, prompts not shared", packed(share_prompts=False)),
    ]
    for n in MICRO_BATCHES:
        table.append(Side(f"row per round, micro-batch {n}", row_per_round(n)))
    table.append(Side("row per round, micro-batch 8, checkpointing", row_per_round(8), checkpointing=True))
    return {side.name: side for side in table}


def step(side: Side, args: argparse.Namespace, model, batch: dict, trainer: Trainer):
    start = time.perf_counter()
    logps, tokens = side.run(trainer, batch, model)
    return logps, tokens, time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes of this process's resident set now (`VmRSS`) or at its peak (`VmHWM`), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(side: Side, args: argparse.Namespace) -> int:
    """Bytes above weights and gradients; runs in a process of its own."""
    with TemporaryDirectory() as directory:
        model = build_model(args)
        trainer = build_trainer(model, directory, side.checkpointing)
        small = argparse.Namespace(**{**vars(args), "prompt": args.block, "response": args.block})
        step(side, small, model, build_batch(small, model), trainer)  # whatever libraries allocate once
        batch = build_batch(args, model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).fill_(0)  # zeros_like would not touch its pages yet
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; ru_maxrss would begin with the parent's
        step(side, args, model, batch, trainer)
        return resident("VmHWM") - before


def memory_in_subprocess(side: Side) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side.name]
    return json.loads(
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128, help="prompt length")
    parser.add_argument("--response", type=int, default=256, help="response length, a multiple of the block")
    parser.add_argument("--responses", type=int, default=8, help="responses of the one prompt")
    parser.add_argument("--block", type=int, default=4, help="block length")
    parser.add_argument("--vocab", type=int, default=32_000, help="vocabulary size")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions, of which the best counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.response % args.block:
        parser.error(f"--response must be a multiple of --block, but {args.response} is none of {args.block}")
    torch.set_num_threads(1)
    use_small_logprob_tiles("cpu")
    table = sides()
    if args.memory_of:
        print(json.dumps(measure_memory(table[args.memory_of], args)))
        return

    results = {}
    with TemporaryDirectory() as directory:
        model = build_model(args)
        batch = build_batch(args, model)
        trainers = {flag: build_trainer(model, directory, flag) for flag in (False, True)}
        best = {name: float("inf") for name in table}
        for repeat in range(args.repeats):  # sides take turns, so that a slow moment hits all of them
            for name, side in table.items():
                model.gradient_checkpointing_disable()
                if side.checkpointing:
                    model.gradient_checkpointing_enable()
                model.zero_grad()
                logps, tokens, seconds = step(side, args, model, batch, trainers[side.checkpointing])
                best[name] = min(best[name], seconds)
                if repeat == 0:
                    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
                    results[name] = {"logps": logps, "gradients": gradients, "tokens": tokens}
                print(f"{name}: {seconds:.2f} s", file=sys.stderr, flush=True)

    reference = results[f"row per round, micro-batch {MICRO_BATCHES[0]}"]
    report = {}
    for name, side in table.items():
        got = results[name]
        differences = [
            ((g - reference["gradients"][n]).norm() / reference["gradients"][n].norm()).item()
            for n, g in got["gradients"].items()
        ]
        report[name] = {
            "seconds": best[name],
            "tokens_forwarded": got["tokens"]["forwarded"],
            "tokens_head": got["tokens"]["head"],
            "peak_memory_mib": memory_in_subprocess(side) / 2**20,
            "max_abs_logp_difference": (got["logps"] - reference["logps"]).abs().max().item(),
            "max_relative_gradient_difference": max(differences),
        }

    plain = {n: report[f"row per round, micro-batch {n}"] for n in MICRO_BATCHES}
    fastest = min(side["seconds"] for side in plain.values())
    in_flight = plain[8]["peak_memory_mib"]
    for row in report.values():
        row["speedup_over_best_row_per_round"] = fastest / row["seconds"]
        row["tokens_ratio"] = row["tokens_forwarded"] / plain[1]["tokens_forwarded"]
        row["memory_ratio_to_micro_batch_8"] = row["peak_memory_mib"] / in_flight
    columns = [
        ("s", "seconds", "7.2f"),
        ("speed", "speedup_over_best_row_per_round", "6.2f"),
        ("tokens", "tokens_forwarded", "7d"),
        ("ratio", "tokens_ratio", "6.2f"),
        ("head", "tokens_head", "7d"),
        ("MiB", "peak_memory_mib", "6.0f"),
        ("ratio", "memory_ratio_to_micro_batch_8", "6.2f"),
        ("d logp", "max_abs_logp_difference", "8.1e"),
        ("d grad", "max_relative_gradient_difference", "8.1e"),
    ]
    print(" " * 44, *(f"{title:>{int(form.split('.')[0].rstrip('d'))}}" for title, _, form in columns))
    for name, row in report.items():
        print(f"{name:44}", *(f"{row[key]:{form}}" for _, key, form in columns))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "memory_of")}
        args.output.write_text(
            json.dumps({"settings": settings, "torch": torch.__version__, "sides": report}, indent=2)
        )


if __name__ == "__main__":
    main()
