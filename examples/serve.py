"""
A server that sends answers as server-sent events while they are denoised. For one user on one machine.

    python examples/serve.py Gen-Verse/TraDo-4B-Instruct 8000
    curl -N -d '[{"role": "user", "content": "What is 17 * 23?"}]' http://127.0.0.1:8000
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_trl  # noqa: F401  (registers the families)


class Events:
    """Streamer that sends `text`, which stays, and `draft`, which the next event replaces."""

    def __init__(self, tokenizer, send):
        self.tokenizer, self.send, self.ids, self.is_prompt = tokenizer, send, [], True

    def put(self, ids):  # first the prompt, then each finished block
        if not self.is_prompt:
            self.ids += ids.flatten().tolist()
            # All of it, not the block alone: a character may lie across two blocks
            self.send({"text": self.tokenizer.decode(self.ids, skip_special_tokens=True)})
        self.is_prompt = False

    def put_draft(self, ids):
        masked = self.tokenizer.mask_token_id
        self.send({"draft": [None if i == masked else self.tokenizer.decode([i]) for i in ids.flatten().tolist()]})

    def end(self):
        self.send({"done": True})


def make_server(name: str, port: int) -> ThreadingHTTPServer:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    one_at_a_time = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()

            def send(event):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()

            with one_at_a_time:
                model.generate(**inputs, streamer=Events(tokenizer, send), tokenizer=tokenizer)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    make_server(sys.argv[1], int(sys.argv[2])).serve_forever()
