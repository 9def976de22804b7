import json
import re
import shutil
import subprocess

import pytest
import torch

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.trace_viewer import save_trace_html, save_trace_json, trace_dict, trace_html
from dllm_trl.types import DiffusionRollout, Grid
from tests.trainers.tiny_rl import EOS_IDS, make_model, make_tokenizer


EOS = 256
PAD = 257


class ByteTokenizer:
    """One token per byte: every character outside ASCII is several tokens."""

    special = {EOS: "<eos>", PAD: "<pad>"}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        text, pending = "", bytearray()
        for i in ids:
            if i in self.special:
                text, pending = text + pending.decode(errors="replace") + self.special[i], bytearray()
            else:
                pending.append(i)
        return text + pending.decode(errors="replace")


class WordTokenizer:
    """One token per word: spaces exist only between two tokens."""

    words = ["one", "plus", "two", "is", "three"]

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return " ".join(self.words[i] for i in ids)


def make_rollout(prompts, responses, steps, lengths, block_length=4):
    """Rows from lists: `lengths` says how many tokens of each response belong to the completion."""
    width, response = max(map(len, prompts)), max(map(len, responses))

    def right(rows, fill):
        return torch.tensor([row + [fill] * (response - len(row)) for row in rows])

    return DiffusionRollout(
        prompt_ids=torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
        prompt_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        completion_ids=right([r[:n] for r, n in zip(responses, lengths)], PAD),
        completion_mask=right([[1] * n for n in lengths], 0),
        canvas_ids=right(responses, PAD),
        canvas_mask=right([[1] * len(r) for r in responses], 0),
        step_map=right(steps, -1),
        logprobs=right([[-0.25 * (s + 1) if s >= 0 else 0.0 for s in row] for row in steps], 0.0),
        num_forward_passes=torch.tensor([max(row) + 1 for row in steps]),
        grid=Grid(block_length),
    )


@pytest.fixture
def rollout():
    hostile = list("<b>é</script>".encode())
    return make_rollout(
        prompts=[list(b"ab"), list(b"Say <i>&amp;")],
        responses=[[*b"hi", EOS, PAD, PAD, PAD], [*hostile, EOS, PAD]],
        steps=[[1, 0, 2, 2, 3, 3], [k // 2 for k in range(len(hostile) + 2)]],
        lengths=[3, len(hostile) + 1],
    )


def embedded(page):
    """The text of the page's data element."""
    return re.search(r'<script id="trace" type="application/json">(.*?)</script>', page, re.DOTALL).group(1)


def test_trace_holds_the_rollout(rollout):
    trace = trace_dict(rollout, ByteTokenizer(), answers=["hi", None], rewards=torch.tensor([1.0, float("nan")]))
    first, second = trace["samples"]
    assert trace["block_length"] == 4
    assert first == {
        "prompt": "ab",
        "completion": "hi<eos>",
        "answer": "hi",
        "reward": 1.0,
        "num_forward_passes": 4,
        "completion_length": 3,
        "given": ["a", "b"],
        "ids": [*b"hi", EOS, PAD, PAD, PAD],
        "texts": ["h", "i", "<eos>", "<pad>", "<pad>", "<pad>"],
        "steps": [1, 0, 2, 2, 3, 3],
        "logprobs": [-0.5, -0.25, -0.75, -0.75, -1.0, -1.0],
        "spans": [],
    }
    assert second["answer"] is None and second["reward"] is None
    assert second["given"] == []  # 12 prompt tokens fill three blocks
    assert second["prompt"] == "Say <i>&amp;"


def test_pieces_of_a_character_are_joined():
    text = "é 你🦜"
    ids = list(text.encode())
    rollout = make_rollout([[65]], [ids], [list(range(len(ids)))], [len(ids)])
    sample = trace_dict(rollout, ByteTokenizer())["samples"][0]
    assert sample["spans"] == [[0, 2, "é"], [3, 6, "你"], [6, 10, "🦜"]]
    assert sample["texts"][2] == " "
    assert sample["completion"] == text


def test_half_a_character_at_the_end_stays_alone():
    ids = "é".encode()[:1]
    rollout = make_rollout([[65]], [list(ids)], [[0]], [1])
    sample = trace_dict(rollout, ByteTokenizer())["samples"][0]
    assert sample["spans"] == [] and sample["texts"] == ["\ufffd"]


def test_spaces_between_words_survive():
    rollout = make_rollout([[0, 1, 2]], [[3, 4]], [[0, 1]], [2], block_length=2)
    sample = trace_dict(rollout, WordTokenizer())["samples"][0]
    assert sample["texts"] == [" is", " three"]
    assert sample["given"] == [" two"]


def test_never_committed_positions_stay_masks():
    rollout = make_rollout([[65]], [[*b"a", PAD, PAD]], [[0, -1, -1]], [1])
    sample = trace_dict(rollout, ByteTokenizer())["samples"][0]
    assert sample["steps"] == [0, -1, -1] and sample["logprobs"] == [-0.25, 0.0, 0.0]


def test_prompts_can_be_replaced(rollout):
    trace = trace_dict(rollout, ByteTokenizer(), prompts=["first", "second"])
    assert [s["prompt"] for s in trace["samples"]] == ["first", "second"]


@pytest.mark.parametrize("name", ["prompts", "answers", "rewards"])
def test_one_entry_per_row(rollout, name):
    with pytest.raises(ValueError, match=f"`{name}` must have one entry"):
        trace_dict(rollout, ByteTokenizer(), **{name: [1.0]})


def test_json_is_the_trace(rollout, tmp_path):
    path = tmp_path / "trace.json"
    save_trace_json(path, rollout, ByteTokenizer(), rewards=[0.0, 1.0])
    assert json.loads(path.read_text()) == trace_dict(rollout, ByteTokenizer(), rewards=[0.0, 1.0])


def test_page_embeds_the_trace(rollout, tmp_path):
    save_trace_html(tmp_path / "trace.html", rollout, ByteTokenizer(), answers=["hi", "é"], title="A & <B>")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    trace = trace_dict(rollout, ByteTokenizer(), answers=["hi", "é"])
    assert json.loads(embedded(page)) == {"title": "A & <B>", **trace}


def test_text_cannot_become_markup(rollout):
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>"
    page = trace_html(trace_dict(rollout, ByteTokenizer(), prompts=[evil, evil], answers=[evil, evil]), title=evil)
    assert "alert(1)" in page and "<script>alert" not in page and "onerror=alert(1)>" in page
    assert "<" not in embedded(page)
    assert page.count("</script>") == 2  # the data and the program, nothing else
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_page_requests_nothing(rollout):
    page = trace_html(trace_dict(rollout, ByteTokenizer()))
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//cdn|@import|url\(|<link[^>]+stylesheet|\ssrc=", without_namespace)
    assert "default-src 'none'" in page


def test_page_needs_a_sample():
    with pytest.raises(ValueError, match="no samples"):
        trace_html({"block_length": 4, "samples": []})


chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(chromium is None, reason="needs Chromium to run the page")
@pytest.mark.parametrize("step, shown", [(0, 0), (3, 4)])
def test_page_in_a_browser(rollout, tmp_path, step, shown):
    page = tmp_path / "trace.html"
    save_trace_html(page, rollout, ByteTokenizer(), answers=["hi", None], rewards=[1.0, 0.0])
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [chromium, *flags.split(), "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{page.as_uri()}#sample=1&step={step}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    canvas = re.search(r'<div id="canvas">(.*?)<div id="legend">', dom, re.DOTALL).group(1)
    tokens = re.findall(r'<span class="(tok[^"]*)"', canvas)
    assert len(tokens) == 6
    assert sum("on" in names.split() for names in tokens) == shown
    assert sum("cut" in names.split() for names in tokens) == 3
    assert canvas.count('class="given"') == 2
    assert len(re.findall(r'class="edge[^"]*"', canvas)) == 1
    assert f"step {step} of 4" in dom
    assert "reward 1" in dom


def test_full_attention_counts_blocks_from_the_response():
    """Nothing of the prompt lies in the first block; masks that were never decoded are there and have no text."""
    model, tokenizer = make_model("llada").eval(), make_tokenizer()
    prompt = tokenizer("what is 17?")["input_ids"]
    config = DiffusionGenerationConfig(max_new_tokens=40, block_length=8, do_sample=True, eos_token_id=EOS_IDS)
    rollout = generate_rollouts(model, [prompt], config, seed=1)
    assert rollout.grid.anchor == "response" == rollout.to("cpu").grid.anchor and len(prompt) % 8
    (sample,) = trace_dict(rollout, tokenizer)["samples"]
    assert sample["given"] == [] and len(sample["ids"]) == 40
    end = sample["steps"].index(-1)
    assert end % 8 == 0 and sample["completion_length"] <= end and set(sample["steps"][end:]) == {-1}
    assert all(sample["texts"][:end]) and sample["texts"][end:] == [""] * (40 - end)
    blocks = [j // 8 for j in range(end)]
    latest = [max(step for step, b in zip(sample["steps"], blocks) if b == block) for block in sorted(set(blocks))]
    assert latest == sorted(latest)


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_the_output_of_generate_is_a_rollout(tmp_path, family):
    tokenizer, model = make_tokenizer(), make_model(family).eval()
    batch = tokenizer(["12+3=", "4"], return_tensors="pt", padding=True)
    kwargs = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    output = model.generate(**batch, **kwargs, return_dict_in_generate=True)
    save_trace_html(tmp_path / "trace.html", output, tokenizer)
    config = DiffusionGenerationConfig(**kwargs)
    rollout = generate_rollouts(model, tokenizer(["12+3=", "4"])["input_ids"], config)
    assert trace_dict(output, tokenizer) == trace_dict(rollout, tokenizer)
    with pytest.raises(ValueError, match="`return_dict_in_generate=True`, but is a Tensor"):
        save_trace_html(tmp_path / "trace.html", output.sequences, tokenizer)
