"""
Decoding speed: ours against a plain per-sequence block diffusion loop and against a naive padded batch, both written
here over the model's stock modules. Same weights, same greedy tokens (checked), all sides in one run, one thread.

    python benchmarks/decode.py                        # the whole table
    python benchmarks/decode.py --batch 8 --repeats 5  # one batch size
"""

import argparse
import json
import time
from functools import partial

import torch
from transformers import DynamicCache, set_seed

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM


def tiny_model(vocab_size: int, block_length: int) -> SDARForCausalLM:
    """4 layers, hidden 256; weights wide enough that greedy decoding has no near-ties."""
    set_seed(0)
    config = SDARConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        block_size=block_length,
        mask_token_id=vocab_size - 1,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return SDARForCausalLM(config).eval()


def commit_quota(block: int, steps: int, step: int) -> int:
    return block // steps + (step < block % steps)


def choose(logits: torch.Tensor, masked: torch.Tensor, quota: int, threshold: float, mask_id: int):
    """Greedy tokens of one block `(W,)` and which of them low_confidence_dynamic commits."""
    probs = logits.float().softmax(-1)
    logits = logits.clone()
    logits[:, mask_id] = -torch.inf
    tokens = logits.argmax(-1)
    confidence = probs.gather(-1, tokens[:, None]).squeeze(-1).masked_fill(~masked, -1)
    commit = confidence > threshold
    if commit.sum() < quota:
        commit = torch.zeros_like(masked)
        commit[confidence.topk(min(quota, int(masked.sum()))).indices] = True
    return tokens, commit


@torch.no_grad()
def per_sequence(model, prompts, limits, block, steps, threshold):
    """One sequence at a time: DynamicCache, denoise the block without storing it, then a forward that commits it."""
    mask_id, outputs = model.config.mask_token_id, []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = torch.tensor(prompt)
        done = len(prompt) // block * block
        cache = DynamicCache(config=model.config)
        if done:
            model.model(input_ids=ids[None, :done], past_key_values=cache, use_cache=True)
        end = len(prompt) + limit
        ids = torch.cat([ids, torch.full((limit,), mask_id)])
        while done < end:
            width = min(block, end - done)
            canvas = ids[done : done + width]
            positions = torch.arange(done, done + width)[None]
            visible = torch.ones(1, 1, width, done + width, dtype=torch.bool)
            step = 0
            while (masked := canvas == mask_id).any():
                out = model(
                    input_ids=canvas[None],
                    position_ids=positions,
                    attention_mask=visible,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache.crop(-width)
                tokens, commit = choose(out.logits[0], masked, commit_quota(block, steps, step), threshold, mask_id)
                canvas[commit] = tokens[commit]
                step += 1
            done += width
            if done < end:
                model.model(
                    input_ids=canvas[None],
                    position_ids=positions,
                    attention_mask=visible,
                    past_key_values=cache,
                    use_cache=True,
                )
        outputs.append(ids[len(prompt) :].tolist())
    return outputs


@torch.no_grad()
def padded_batch(model, prompts, limits, block, steps, threshold):
    """
    All sequences in lockstep over one left-padded cache, as batched reference code does: padded to the longest prompt
    on the block grid, everybody waits for the slowest row of each block and for the longest response, a commit forward
    per block, logits at every position of the block.
    """
    mask_id, batch = model.config.mask_token_id, len(prompts)
    heads = [len(p) // block * block for p in prompts]
    width = max(heads)
    offset = torch.tensor([width - head for head in heads])  # padding is whole blocks, so all grids line up
    total = width + max(len(p) % block + n for p, n in zip(prompts, limits, strict=True))
    total = -(-total // block) * block
    ids = torch.full((batch, total), mask_id)
    ends = offset + torch.tensor([len(p) + n for p, n in zip(prompts, limits, strict=True)])
    for i, prompt in enumerate(prompts):
        ids[i, : offset[i]] = 0
        ids[i, offset[i] : offset[i] + len(prompt)] = torch.tensor(prompt)
    columns = torch.arange(total)
    exists = (columns >= offset[:, None]) & (columns < ends[:, None])
    positions = (columns - offset[:, None]).clamp(min=0)
    blocks = columns // block
    cache = DynamicCache(config=model.config)
    if width:
        mask = (blocks[:width, None] >= blocks[:width]) & exists[:, None, :width]
        mask = (mask | torch.eye(width, dtype=torch.bool))[:, None]  # padding sees itself: no empty softmax
        model.model(
            input_ids=ids[:, :width],
            position_ids=positions[:, :width],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
    for done in range(width, total, block):
        here = slice(done, done + block)
        visible = exists[:, None, None, : done + block].expand(-1, 1, block, -1)
        visible = visible | (columns[: done + block] == columns[here, None])
        kwargs = {"position_ids": positions[:, here], "attention_mask": visible, "past_key_values": cache}
        step = 0
        while (masked := (ids[:, here] == mask_id) & exists[:, here]).any():
            out = model(input_ids=ids[:, here], use_cache=True, **kwargs)
            cache.crop(-block)
            quota = commit_quota(block, steps, step)
            for i in masked.any(-1).nonzero()[:, 0].tolist():
                tokens, commit = choose(out.logits[i], masked[i], quota, threshold, mask_id)
                ids[i, here][commit] = tokens[commit]
            step += 1
        if done + block < total:
            model.model(input_ids=ids[:, here], use_cache=True, **kwargs)
    return [ids[i, offset[i] + len(p) : ends[i]].tolist() for i, p in enumerate(prompts)]


def ours(model, prompts, limits, block, steps, threshold, num_slots, num_generations=1, **sampling):
    config = DiffusionGenerationConfig(
        block_length=block,
        denoising_steps=steps,
        confidence_threshold=threshold,
        eos_token_id=-1,
        **(sampling or {"remasking_strategy": "low_confidence_dynamic", "do_sample": False}),
    )
    rollout = generate_rollouts(model, prompts, config, num_generations, limits, num_slots)
    return [ids[mask.bool()].tolist() for ids, mask in zip(rollout.canvas_ids, rollout.canvas_mask, strict=True)]


def best(function, repeats: int) -> tuple[float, list[list[int]]]:
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def ragged(count: int, vocab_size: int, low: int, high: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.linspace(low, high, count).round().long()[torch.randperm(count, generator=generator)]
    return [torch.randint(1, vocab_size - 1, (n,), generator=generator).tolist() for n in sizes.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model(args.vocab, args.block)
    common = (args.block, args.steps, args.threshold)
    results = []
    for batch in args.batch:
        # Batch 1 takes eight requests one at a time
        prompts = ragged(max(batch, 8), args.vocab, 16, 128)
        requests = (model, prompts, torch.linspace(96, 16, len(prompts)).round().long().tolist(), *common)
        t_ours, a = best(partial(ours, *requests, batch), args.repeats)
        t_loop, b = best(partial(per_sequence, *requests), args.repeats)
        t_pad, c = best(partial(padded_batch, *requests), args.repeats) if batch > 1 else (None, a)
        assert a == b == c, "the sides disagree on the tokens"
        row = {"batch": batch, "tokens_per_s": sum(map(len, a)) / t_ours, "vs_per_sequence": t_loop / t_ours}
        row["vs_padded_batch"] = t_pad / t_ours if t_pad else None
        results.append(row)
        print(json.dumps({k: v if v is None else round(v, 2) for k, v in row.items()}), flush=True)
    # Siblings must be sampled: so coldly that all get the same tokens, in steps that do not look at confidences
    prompt, group = ragged(1, args.vocab, 512, 512)[0], 8
    cold = partial(ours, model, remasking_strategy="low_confidence_static", temperature=1e-4)
    t_shared, a = best(lambda: cold([prompt], [32], *common, group, group), args.repeats)
    t_alone, b = best(
        lambda: [cold([prompt], [32], *common, 1)[0] for _ in range(group)], args.repeats
    )  # one prefill each
    salted = [[prompt[0] + i] + prompt[1:] for i in range(group)]  # the same work in one batch, nothing to share
    t_batch, _ = best(lambda: cold(salted, [32] * group, *common, group), args.repeats)
    assert a == b, "siblings disagree on the tokens"
    row = {
        "group": group,
        "prompt": 512,
        "vs_own_prefill_one_batch": t_batch / t_shared,
        "vs_alone": t_alone / t_shared,
    }
    results.append(row)
    print(json.dumps({k: round(v, 2) for k, v in row.items()}), flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"torch": torch.__version__, "args": vars(args), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
