"""Process rewards: chunks, questions, verdicts, votes, and a judge behind a real server that misbehaves."""

import asyncio
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from dllm_trl.rewards import (
    _endpoint,
    chunk_rewards,
    judge_vote,
    math_reward,
    openai_judge,
    parse_verdict,
    process_reward,
    transformers_judge,
)
from dllm_trl.rewards._chunks import cut_response, problem_text

from ..trainers.tiny_rl import make_tokenizer


RIGHT, WRONG = r"Fine. \boxed{1}", r"No. \boxed{-1}"


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


# -------------------------------------------------------------------------------------------------------------- chunks


@given(st.text("ab 0\n.", max_size=60), st.integers(1, 9), st.sampled_from(["ids", "text", "words", "share"]))
def test_chunks_are_the_text(text, chunk_tokens, how):
    """Cut by the policy's tokens, by those of its tokenizer, by words, or in proportion."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if how == "words":
        chunks = cut_response(text, None, chunk_tokens)
        assert all(len(chunk.split()) == chunk_tokens for chunk in chunks[:-1])
    elif how == "text":
        chunks = cut_response(text, None, chunk_tokens, tokenizer)
        assert len(chunks) == -(-(len(ids) - 1) // chunk_tokens)
    else:
        chunks = cut_response(text, ids, chunk_tokens, tokenizer if how == "ids" else None)
        assert len(chunks) == -(-len(ids) // chunk_tokens)
        if how == "ids":
            pieces = [ids[start : start + chunk_tokens] for start in range(0, len(ids), chunk_tokens)]
            assert chunks == [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]
    assert "".join(chunks) == text


def test_chunks_of_nothing_and_of_another_text():
    assert cut_response("", [], 4) == [] and cut_response("", None, 4) == []
    assert cut_response("", [1], 4) == [""]  # EOS
    assert cut_response("ab", [7, 8, 9, 1], 2, make_tokenizer()) == ["ab"[:2], ""]  # ids that spell a longer text


def test_problems():
    assert problem_text("What?") == "What?"
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    turns += [{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "What?"}]
    assert problem_text(turns) == "What?" and problem_text(turns[:1]) == ""
    parts = [{"type": "image"}, {"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]
    assert problem_text([{"role": "user", "content": parts}]) == "Who?"


# ------------------------------------------------------------------------------------------------- verdicts and votes


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (RIGHT, 1.0),
        (WRONG, -1.0),
        (r"\boxed{-1} or rather \boxed{ $+1$ }", 1.0),
        (r"\boxed{0}", 0.0),
        (r"\boxed{-0.5}", -0.5),
        (r"\boxed{.25}", 0.25),
        (r"\boxed{1.0}", 1.0),
        (r"\boxed{1.5}", None),
        (r"\boxed{2}", None),
        (r"\boxed{yes}", None),
        (r"\boxed{nan}", None),
        (r"\boxed{1e0}", None),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        ("1", None),
        ("", None),
    ],
)
def test_verdicts(answer, verdict):
    assert parse_verdict(answer) == verdict


def test_votes():
    assert judge_vote([1.0, 1.0, 1.0], False) == 1.0 and judge_vote([-1.0], True) == -1.0
    assert judge_vote([1.0, -1.0], True) == 1.0 and judge_vote([1.0, 1.0, 0.0], False) == -1.0
    assert judge_vote([0.0, 0.0], True) == 0.0 and judge_vote([0.0, 0.0], False, zero_stands=False) == -1.0
    assert judge_vote([1.0, 1.0, -1.0]) == pytest.approx(1 / 3) and judge_vote([], True) is None


# ---------------------------------------------------------------------------------------------------------- the reward


def test_what_is_asked():
    asked = []

    def judge(questions, num_samples):
        asked.extend(questions)
        return [[RIGHT, WRONG]] * len(questions)

    template = "{problem}|{before}|{chunk}|{response}|{outcome}|{other}"
    reward = process_reward(judge, 2, num_votes=2, outcome=math_reward, template=template)
    completions = [r"a {chunk} c \boxed{4}", "x", r"a \boxed{5}"]
    prompts = [[{"role": "user", "content": "2+2?"}], "2+2?", "2+2?"]
    found = reward(completions=completions, prompts=prompts, answer=["4", None, "4"], trainer_state=None)
    assert asked == [
        r"2+2?||a {chunk}|a {chunk} c \boxed{4}|correct|{other}",
        r"2+2?|a {chunk}| c \boxed{4}|a {chunk} c \boxed{4}|correct|{other}",
        "2+2?||x|x|unknown|{other}",
        r"2+2?||a \boxed{5}|a \boxed{5}|incorrect|{other}",
    ]
    assert found == [[1.0, 1.0], [0.0], [-1.0]]  # they differ: as the answer is; where nobody knows, the mean
    assert reward.__name__ == "process_reward" and reward.chunk_tokens == 2


def test_the_template_says_all():
    seen = []
    reward = process_reward(lambda questions, n: seen.extend(questions) or [[RIGHT] * n for _ in questions], 2)
    conversation = [[{"role": "assistant", "content": "one two three"}]]
    assert reward(prompts=[[{"role": "user", "content": "How?"}]], completions=conversation) == [[1.0, 1.0]]
    assert all("How?" in q and r"\boxed{1}" in q for q in seen) and "one two" in seen[1] and "three" not in seen[0]
    assert reward(prompts=[], completions=[]) == []
    assert reward(prompts=["How?"], completions=[""], completion_ids=[[]]) == [[]]


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("slow"), torch.OutOfMemoryError("full")])
def test_a_judge_that_dies_costs_its_votes(warnings_of, error):
    def judge(questions, num_samples):
        raise error

    assert process_reward(judge, 1)(prompts=["?"], completions=["a b"]) == [[None, None]]
    (message,) = warnings_of()
    assert "6 of 6 votes are missing" in message and str(error) in message and "2 of 2 chunks" in message


def test_votes_that_are_missing_do_not_count(warnings_of):
    answers = [[RIGHT, "no idea", ValueError("x")], [WRONG, RIGHT, ValueError("x")], ["", "", ""]]
    reward = process_reward(lambda questions, n: answers, 1, outcome=lambda completions, **kwargs: [0.9])
    assert reward(prompts=["?"], completions=["a b c"]) == [[1.0, 1.0, None]]
    (message,) = warnings_of()
    assert "6 of 9 votes are missing, 4 of them because of: no verdict" in message and "1 of 3 chunks" in message


def test_a_judge_with_too_few_answers_is_a_mistake():
    with pytest.raises(ValueError, match="`judge` must answer each of 2 questions, but answered 1"):
        process_reward(lambda questions, n: [[RIGHT]], 1)(prompts=["?"], completions=["a b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 0}, "`chunk_tokens` must be a whole number from 1 on, but is 0"),
        ({"num_votes": 1.5}, "`num_votes` must be a whole number"),
        ({"template": "{problem}"}, "`template` must hold `{chunk}`"),
    ],
)
def test_options_of_the_reward(options, message):
    with pytest.raises(ValueError, match=message):
        process_reward(lambda questions, n: [], **options)


# ------------------------------------------------------------------------------------------------------------ a server


class Server:
    """A judge's endpoint on loopback. `behave` gets a request's number and body, and its handler, and answers."""

    def __init__(self, behave):
        self.requests, self.headers, self.times, self.most, self.now = [], [], [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    behave(number, body, self)
                except BrokenPipeError:  # the client did not wait
                    pass
                finally:
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def send(handler, payload: bytes, status: int = 200, length: int | None = None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(payload) if length is None else length))
    handler.end_headers()
    handler.wfile.write(payload)


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def trickle(handler):
    """A byte now and then: no read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def serve(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_endpoint, "BACKOFF", 0.02)
    servers = []

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


BAD = {
    "hangs": lambda handler: time.sleep(1.5),
    "trickles": trickle,
    "500": lambda handler: send(handler, b"oops", 500),
    "429": lambda handler: send(handler, b"{}", 429),
    "half an answer": lambda handler: send(handler, completion(RIGHT)[:20], length=500),
    "half a json": lambda handler: send(handler, completion(RIGHT)[:20]),
    "no json": lambda handler: send(handler, b"<html>\xff\xfe</html>"),
    "deep json": lambda handler: send(handler, b"[" * 100_000),
    "closes": lambda handler: handler.connection.close(),
    "garbage": lambda handler: handler.wfile.write(b"\x00\x01\x02\r\n\r\n"),
    "no choices": lambda handler: send(handler, b'{"choices": []}'),
    "a list": lambda handler: send(handler, b"[1, 2]"),
    "null": lambda handler: send(handler, b"null"),
    "no text": lambda handler: send(handler, completion(None)),
    "a number": lambda handler: send(handler, completion(1)),
}


@pytest.mark.parametrize("name", BAD)
def test_an_endpoint_that_misbehaves(serve, warnings_of, name):
    """It is asked again and again about the chunk that fails, and the others are judged."""

    def behave(number, body, handler):
        if "bad" in body["messages"][0]["content"]:
            BAD[name](handler)
        else:
            send(handler, completion(RIGHT))

    server = serve(behave)
    judge = openai_judge(server.url, "m", time_limit=0.4, retries=1, max_concurrency=4)
    reward = process_reward(judge, 1, num_votes=1, template="{chunk}")
    assert reward(prompts=["?"] * 2, completions=["a bad b", "c"]) == [[1.0, None, 1.0], [1.0]]
    assert len(server.requests) == 5  # 3, and the bad one twice
    (message,) = warnings_of()
    assert "1 of 4 votes are missing" in message and "1 of 4 chunks have no score" in message
    assert ("no answer within 0.4 s" in message) == (name in ("hangs", "trickles"))


@pytest.mark.parametrize("name", ["500", "hangs", "closes", "half a json"])
def test_what_fails_once_is_asked_again(serve, warnings_of, name):
    server = serve(lambda number, body, handler: send(handler, completion(WRONG)) if number else BAD[name](handler))
    judge = openai_judge(server.url, "m", time_limit=0.4)
    assert process_reward(judge, num_votes=1)(prompts=["?"], completions=["a"]) == [[-1.0]]
    assert len(server.requests) == 2 and not warnings_of()


def test_pauses_grow(serve, monkeypatch):
    monkeypatch.setattr(_endpoint, "BACKOFF", 0.1)
    server = serve(lambda number, body, handler: send(handler, b"", 503))
    openai_judge(server.url, "m", retries=3)(["a"], 1)
    pauses = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(pauses) == 3 and all(pause > least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True))


def test_a_refusal_is_final(serve, warnings_of):
    server = serve(lambda number, body, handler: send(handler, b"who are you?", 401))
    reward = process_reward(openai_judge(server.url, "m"), num_votes=2)
    assert reward(prompts=["?"], completions=["a"]) == [[None]]
    assert len(server.requests) == 2 and "status 401: who are you?" in warnings_of()[0]


def test_a_server_that_dies_in_the_middle(serve, warnings_of):
    def behave(number, body, handler):
        send(handler, completion(RIGHT))
        if number == 4:
            threading.Thread(target=server.close).start()

    server = serve(behave)
    judge = openai_judge(server.url, "m", retries=1, max_concurrency=1, time_limit=1.0)
    reward = process_reward(judge, 1, num_votes=1)
    (scores,) = reward(prompts=["?"], completions=[" ".join("abcdefghijkl")])
    assert scores[:5] == [1.0] * 5 and None in scores and len(scores) == 12
    started = time.monotonic()
    (scores,) = reward(prompts=["?"], completions=[" ".join("mnopqrstuvwxyz" * 20)])
    assert scores == [None] * 280 and time.monotonic() - started < 3  # given up, not tried 560 times with pauses
    assert len(warnings_of()) == 2 and "too often in a row" in warnings_of()[1]


def test_time_limits_of_one_request_and_of_all(serve, warnings_of):
    server = serve(lambda number, body, handler: send(handler, completion(RIGHT)) if number == 0 else time.sleep(5))
    judge = openai_judge(server.url, "m", time_limit=10.0, total_time_limit=0.5, max_concurrency=1)
    started = time.monotonic()
    assert process_reward(judge, 1, num_votes=1)(prompts=["?"], completions=["a b c"]) == [[1.0, None, None]]
    assert 0.4 < time.monotonic() - started < 2
    assert "no answer within `total_time_limit=0.5` s" in warnings_of()[0]


def test_few_requests_at_a_time(serve):
    def behave(number, body, handler):
        time.sleep(0.05)
        send(handler, completion(RIGHT))

    server = serve(behave)
    judge = openai_judge(server.url, "m", max_concurrency=3)
    reward = process_reward(judge, 1, num_votes=2)
    assert reward(prompts=["?"], completions=["a b c d e f g h i"]) == [[1.0] * 9]
    assert server.most == 3 and len(server.requests) == 18


def test_answers_are_kept(serve, tmp_path):
    """Across judges, by what is asked: each sample of a question is one, equal questions are asked once."""
    server = serve(lambda number, body, handler: send(handler, completion(WRONG if number % 2 else RIGHT)))
    options = {"cache_dir": tmp_path / "verdicts", "max_concurrency": 1}
    first = openai_judge(server.url, "m", **options)(["a", "b", "a"], 2)
    assert first == [[RIGHT, WRONG]] * 3 and len(server.requests) == 4
    assert openai_judge(server.url, "m", **options)(["b", "a"], 2) == [[RIGHT, WRONG]] * 2
    assert len(server.requests) == 4
    openai_judge(server.url, "m", **options)(["a", "c"], 3)  # a third sample of a, three of c
    assert len(server.requests) == 8
    openai_judge(server.url, "other", **options)(["a"], 1)
    openai_judge(server.url, "m", sampling={"temperature": 0.0}, **options)(["a"], 1)
    assert len(server.requests) == 10
    assert server.requests[-1] == {
        "model": "m",
        "temperature": 0.0,
        "messages": [{"role": "user", "content": "a"}],
    }


def test_failures_are_not_kept_and_broken_files_are_asked_anew(serve, tmp_path, warnings_of):
    server = serve(lambda number, body, handler: send(handler, completion(RIGHT), 200 if number else 500))
    judge = openai_judge(server.url, "m", retries=0, cache_dir=tmp_path)
    ((answer,),) = judge(["a"], 1)
    assert isinstance(answer, Exception) and not list(tmp_path.rglob("*"))
    assert judge(["a"], 1) == [[RIGHT]]
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_text('"half of a')
    assert judge(["a"], 1) == [[RIGHT]] and len(server.requests) == 3
    assert judge(["a"], 1) == [[RIGHT]] and len(server.requests) == 3
    (tmp_path / "file").write_text("")
    nowhere = openai_judge(server.url, "m", cache_dir=tmp_path / "file")
    assert nowhere(["a"], 1) == [[RIGHT]] and "could not be kept" in warnings_of()[0]


def test_the_key_is_sent_and_nowhere_else(serve, tmp_path, monkeypatch):
    server = serve(lambda number, body, handler: send(handler, completion(RIGHT)))
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    openai_judge(server.url, "m", api_key_env="JUDGE_KEY", cache_dir=tmp_path)(["a"], 1)
    openai_judge(server.url, "m")(["a"], 1)
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer sesame", None]
    assert not any("sesame" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="`api_key_env='JUDGE_KEY'` names an environment variable that is not set"):
        openai_judge(server.url, "m", api_key_env="JUDGE_KEY")


def test_a_judge_may_be_asked_within_an_event_loop(serve):
    server = serve(lambda number, body, handler: send(handler, completion(RIGHT)))
    judge = openai_judge(server.url, "m")

    async def main():
        return judge(["a"], 1)

    assert asyncio.run(main()) == [[RIGHT]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "`base_url` must begin with `http://` or `https://`"),
        ({"max_concurrency": 0}, "`max_concurrency` must be a whole number from 1 on"),
        ({"retries": -1}, "`retries` must be a whole number from 0 on, but is -1"),
        ({"time_limit": 0}, "`time_limit` must be above 0 seconds, but is 0"),
        ({"total_time_limit": float("nan")}, "`total_time_limit` must be above 0 seconds"),
    ],
)
def test_options_of_the_endpoint(options, message):
    with pytest.raises(ValueError, match=message):
        openai_judge(**{"base_url": "http://localhost:1/v1", "model": "m", **options})


# --------------------------------------------------------------------------------------------- models in this process


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.5, "vocab_size": 54, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal model and a reward model, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    scoring = AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, num_labels=1))
    for name, model in (("causal", causal), ("scoring", scoring)):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


def test_a_judge_in_this_process(folders):
    """Samples differ, are the same again, and no generator of the run moves."""
    judge = transformers_judge(str(folders / "causal"), max_new_tokens=8, batch_size=3)
    state = torch.get_rng_state()
    answers = judge(["1+1", "2+2=4?"], 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(one) for one in answers] == [2, 2] and len({a for one in answers for a in one}) == 4
    assert judge(["1+1", "2+2=4?"], 2) == answers and judge([], 2) == []
    model = AutoModelForCausalLM.from_pretrained(folders / "causal")
    greedy = transformers_judge(model, make_tokenizer(), max_new_tokens=8, sampling={"do_sample": False})
    (alone,), both = greedy(["1+1"], 1), greedy(["1+1", "2+2=4?"], 1)
    assert alone == both[0]
    reward = process_reward(greedy, 2, num_votes=1, parse=lambda answer: len(answer) / 100)
    (scores,) = reward(prompts=["?"], completions=["a b c"])
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model_scores_each_prefix(folders, conversational):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folders / "scoring"), make_tokenizer()
    prompts, completions = ["1+1=", "2+2="], ["two, i think", "4"]
    ids = [tokenizer(text)["input_ids"] for text in completions]
    expected = []
    for prompt, own in zip(prompts, ids, strict=True):
        ends = range(5, len(own) + 5, 5)
        prefixes = [tokenizer.decode(own[:end]) for end in ends]
        texts = [prompt + p for p in prefixes]
        if conversational:
            texts = [f"<user>{prompt}<eos><assistant>{p}<eos>" for p in prefixes]
        with torch.no_grad():
            expected.append([model(**tokenizer(t, return_tensors="pt")).logits.item() for t in texts])
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    for given_model, given_tokenizer in ((str(folders / "scoring"), None), (model, tokenizer)):
        reward = chunk_rewards(given_model, given_tokenizer, 5, policy_tokenizer=tokenizer, batch_size=2)
        found = reward(prompts=prompts, completions=completions, completion_ids=ids)
        assert [len(one) for one in found] == [3, 1] and reward.chunk_tokens == 5
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    fresh = AutoModelForSequenceClassification.from_config(model.config)
    fresh.config.name_or_path = ""
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        chunk_rewards(fresh)
