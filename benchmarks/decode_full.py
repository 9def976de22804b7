"""
Full-attention decoding: what the engine and the approximate caches save on a random LLaDA, and what a confidence
threshold saves on a model that this script trains itself on two tasks with checkable answers. All sides in one run,
one thread.

    python benchmarks/decode_full.py --output benchmarks/results/decode_full.json
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from transformers import set_seed

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.modeling.llada import LLaDAConfig, LLaDAModelLM


def llada(vocab_size: int, layers: int, hidden: int, **kwargs) -> LLaDAModelLM:
    set_seed(0)
    config = LLaDAConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        mask_token_id=vocab_size - 1,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        **kwargs,
    )
    return LLaDAModelLM(config).eval()


@torch.no_grad()
def plain(model: LLaDAModelLM, prompts: list[list[int]], length: int, block: int) -> torch.Tensor:
    """As usually written: a left-padded batch, all of it computed in every step, logits of all positions."""
    mask_id, width = model.config.mask_token_id, max(map(len, prompts))
    canvas = torch.tensor([[0] * (width - len(p)) + p + [mask_id] * length for p in prompts])
    attended = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + length) for p in prompts])
    for start in range(width, width + length, block):
        here = slice(start, start + block)
        for _ in range(block):
            logits = model(input_ids=canvas, attention_mask=attended).logits
            logits[..., mask_id] = -torch.inf
            probabilities, tokens = logits.softmax(-1).max(-1)
            masked = canvas[:, here] == mask_id
            place = probabilities[:, here].masked_fill(~masked, -1).argmax(-1, keepdim=True)
            canvas[:, here] = canvas[:, here].scatter(1, place, tokens[:, here].gather(1, place))
    return canvas[:, width:]


def caches(batch: int, args) -> dict:
    """The plain loop, `cache="none"`, `"prefix"` and `"dual"`: the same prompts, steps and quotas, in turns."""
    model = llada(args.vocab, 4, 256, initializer_range=0.08)
    generator = torch.Generator().manual_seed(batch)
    sizes = torch.linspace(16, 64, batch).round().long().tolist()
    prompts = [torch.randint(1, args.vocab - 1, (n,), generator=generator).tolist() for n in sizes]
    times, forwards = {"none": [], "prefix": [], "dual": []}, {}
    loop = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        expected = plain(model, prompts, args.length, args.block)
        loop.append(time.perf_counter() - start)
        for cache, measured in times.items():
            config = DiffusionGenerationConfig(
                max_new_tokens=args.length, block_length=args.block, cache=cache, do_sample=False, eos_token_id=-1
            )
            start = time.perf_counter()
            rollout = generate_rollouts(model, prompts, config)
            measured.append(time.perf_counter() - start)
            forwards[cache] = int(rollout.num_forward_passes.sum())
            assert (rollout.step_map >= 0).all()
            if cache == "none":
                assert torch.equal(rollout.canvas_ids, expected), "not the plain loop's tokens"
    assert len(set(forwards.values())) == 1, "the sides differ in their forwards"
    fastest = {cache: min(measured) for cache, measured in times.items()}
    return {
        "batch": batch,
        "none_vs_plain_loop": min(loop) / fastest["none"],
        "dual_vs_none": fastest["none"] / fastest["dual"],
        "prefix_vs_none": fastest["none"] / fastest["prefix"],
        "tokens_per_s": {
            name: batch * args.length / seconds for name, seconds in {"plain_loop": min(loop), **fastest}.items()
        },
    }


DIGITS, MASK = 10, 13  # ids 1 .. 10 are the digits, 11 is "=", 0 pads
CHAIN = 6  # digits of a running sum
TASKS = {  # name -> the answer to digits `(B, L)`, and training steps until it is right
    "complements to 9": (lambda digits: 9 - digits, 400),
    "running sums of 6": (lambda digits: digits.unflatten(1, (-1, CHAIN)).cumsum(-1).flatten(1) % DIGITS, 1500),
}


def questions(task: str, count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits, and what they become. A complement needs its digit only, a running sum the one before it, too."""
    digits = torch.randint(0, DIGITS, (count, length), generator=generator)
    prompts = torch.cat([digits + 1, torch.full((count, 1), DIGITS + 1)], dim=1)
    return prompts, TASKS[task][0](digits) + 1


def trained(task: str, length: int) -> LLaDAModelLM:
    """LLaDA's objective on random masks, until the answers are right when enough is known."""
    model = llada(MASK + 1, 2, 64, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    steps = TASKS[task][1]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        prompts, answers = questions(task, 64, length, generator)
        level = torch.rand(len(answers), 1, generator=generator) * 0.95 + 0.05
        masked = torch.rand(answers.shape, generator=generator) < level
        noisy = torch.cat([prompts, answers.masked_fill(masked, MASK)], dim=1)
        logits = model(input_ids=noisy).logits[:, prompts.size(1) :]
        losses = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none") * masked / level
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def threshold(task: str, args) -> dict:
    """One token per forward, all tokens above 0.9, and a forward per block: forwards and exact answers."""
    length = args.digits
    start = time.perf_counter()
    model = trained(task, length)
    seconds = time.perf_counter() - start
    prompts, answers = questions(task, args.questions, length, torch.Generator().manual_seed(1))
    rows = []
    for strategy, steps in (
        ("low_confidence_static", None),
        ("low_confidence_dynamic", None),
        ("low_confidence_static", 1),
    ):
        for cache in ("none", "dual"):
            config = DiffusionGenerationConfig(
                max_new_tokens=length,
                block_length=length // 2,
                denoising_steps=steps,
                remasking_strategy=strategy,
                confidence_threshold=0.9,
                cache=cache,
                do_sample=False,
                eos_token_id=-1,
            )
            rollout = generate_rollouts(model, prompts.tolist(), config)
            right = (rollout.completion_ids == answers).all(-1).float().mean().item()
            forwards = rollout.num_forward_passes.float().mean().item()
            name = strategy if steps is None else f"{strategy}, {steps} step"
            rows.append({"strategy": name, "cache": cache, "forwards": forwards, "accuracy": right})
    return {"task": task, "train_seconds": seconds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--digits", type=int, default=12)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"caches": [], "threshold": []}
    for task in TASKS:
        results["threshold"].append(threshold(task, args))
        print(json.dumps(results["threshold"][-1], indent=1), flush=True)
    for batch in args.batch:
        results["caches"].append(caches(batch, args))
        print(json.dumps(results["caches"][-1]), flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"torch": torch.__version__, "args": vars(args), **results}, file, indent=1)


if __name__ == "__main__":
    main()
