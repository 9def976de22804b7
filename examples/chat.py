"""
Chat in the terminal: finished text, and behind it the block that is being denoised.

    python examples/chat.py Gen-Verse/TraDo-4B-Instruct
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_trl  # noqa: F401  (registers the families)


class Drafts:
    """Streamer that draws an answer again after every denoising step."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.is_prompt = tokenizer, [], True
        print("\0337", end="")  # the terminal remembers where the answer begins

    def put(self, ids):  # first the prompt, then each finished block
        if not self.is_prompt:
            self.ids += ids.flatten().tolist()
        self.is_prompt = False
        self.draw([])

    def put_draft(self, ids):  # the block in the making, mask tokens and all
        self.draw(ids.flatten().tolist())

    def draw(self, draft):
        parts = [self.tokenizer.decode(self.ids, skip_special_tokens=True)]
        parts += ["░" if token == self.tokenizer.mask_token_id else self.tokenizer.decode([token]) for token in draft]
        print("\0338\033[J" + "".join(parts), end="", flush=True)

    def end(self):
        print()


def main(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    messages = []
    for line in sys.stdin if not sys.stdin.isatty() else iter(lambda: input("> "), ""):
        messages.append({"role": "user", "content": line.strip()})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        streamer = Drafts(tokenizer)
        model.generate(**inputs, streamer=streamer, tokenizer=tokenizer)
        messages.append({"role": "assistant", "content": tokenizer.decode(streamer.ids, skip_special_tokens=True)})


if __name__ == "__main__":
    main(sys.argv[1])
