"""Published tokenizer folders load with no remote code, whatever `auto_map` says, and are saved to load again."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

import dllm_trl  # noqa: F401

from ..conftest import PUBLISHED
from ..trainers.tiny_rl import make_tokenizer


TEXTS = [
    "What's 12 + 345?\n\n  x = 1",
    "Ünïcödé é 漢字 DON'T",
    "<|im_start|>user\nHi<|im_end|>\n<|mask|><|beginoftext|>",
]


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """A prompt for permission to run remote code is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("transformers asked for permission to run remote code")

    monkeypatch.setattr("builtins.input", refuse)


def write(path, values):
    path.write_text(json.dumps(values))


@pytest.fixture
def dream_folder(tokenizers_dir, golden_dir, tmp_path):
    """As Dream, DiffuCoder and Dream-Coder are published: vocab.json, merges.txt, a Python class that is not here."""
    folder = tmp_path / "dream"
    folder.mkdir()
    shutil.copy(golden_dir / "dream" / "config.json", folder / "config.json")
    source = json.loads((tokenizers_dir / "sdar" / "tokenizer_config.json").read_text())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["H i", "u s", "us e", "Ġ x", "1 2", "W h", "Wh a", "Wha t", "D O", "N '"]
    tokens = alphabet + [merge.replace(" ", "") for merge in merges]
    tokens += [f"<unused{i}>" for i in range(151643 - len(tokens))]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {i: token for i, token in source["added_tokens_decoder"].items() if int(i) < 151665}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added |= {"151665": {"content": "<|beginoftext|>", **plain}, "151666": {"content": "<|mask|>", **plain}}
    special = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    special |= {"pad_token": "<|endoftext|>", "unk_token": None}
    write(folder / "added_tokens.json", {token["content"]: int(i) for i, token in added.items()})
    write(folder / "special_tokens_map.json", {key: value for key, value in special.items() if value})
    config = {**source, **special, "added_tokens_decoder": added, "tokenizer_class": "DreamTokenizer"}
    config |= {"additional_special_tokens": ["<|beginoftext|>", "<|mask|>"]}
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    write(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"use_fast": False}])
def test_dream(dream_folder, options, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dream_folder, **options)
    assert type(tokenizer).__name__ == "DreamTokenizer" and isinstance(tokenizer, Qwen2Tokenizer)
    named = (tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (151666, 151665, 151643, 151643)
    qwen = Qwen2Tokenizer.from_pretrained(dream_folder)
    for text in TEXTS:
        assert tokenizer(text).input_ids == qwen(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|mask|>").input_ids == [151666]
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_dream_is_saved_as_published(dream_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dream_folder)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "DreamTokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    # What the public class, which is a slow one, reads
    assert json.loads((saved / "vocab.json").read_text()) == json.loads((dream_folder / "vocab.json").read_text())
    lines = [(folder / "merges.txt").read_text().splitlines()[1:] for folder in (dream_folder, saved)]
    assert lines[0] == lines[1]
    added = json.loads((dream_folder / "added_tokens.json").read_text())
    assert json.loads((saved / "added_tokens.json").read_text()) == {**added, "<|new|>": 151667}
    for with_config in (False, True):
        if with_config:
            shutil.copy(dream_folder / "config.json", saved / "config.json")
        again = AutoTokenizer.from_pretrained(saved)
        assert type(again) is type(tokenizer)
        for text in [*TEXTS, "a<|new|>b"]:
            assert again(text).input_ids == tokenizer(text).input_ids
        assert again.special_tokens_map == tokenizer.special_tokens_map
    (saved / "tokenizer.json").unlink()  # and from the files of the public class alone
    again = AutoTokenizer.from_pretrained(saved)
    for text in [*TEXTS, "a<|new|>b"]:
        assert again(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "SomeTokenizer", "SomeTokenizerFast", None])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_family(published_folder, tokenizer_class, legacy, tmp_path):
    for name in PUBLISHED:
        folder = tmp_path / name
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder)
        shutil.copy(published_folder(name) / "config.json", folder / "config.json")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["tokenizer_class"] = tokenizer_class
        reference = ["tokenization_some.SomeTokenizer", None]
        config["auto_map"] = reference if legacy else {"AutoTokenizer": reference}
        if tokenizer_class is None:
            del config["tokenizer_class"]
        write(folder / "tokenizer_config.json", config)
        again = AutoTokenizer.from_pretrained(folder)
        assert isinstance(again, PreTrainedTokenizerFast)
        assert again("12 + 3 = ?").input_ids == tokenizer("12 + 3 = ?").input_ids
        assert again.mask_token_id == tokenizer.mask_token_id
