import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dllm_trl.rewards import _judge as judge_module
from dllm_trl.rewards import format_reward, math_reward
from dllm_trl.rewards import math as math_module
from dllm_trl.rewards._judge import _COMMAND, _pool, judge_all
from dllm_trl.rewards._text import find_boxes, last_box


pytest.importorskip("math_verify")

DATA = Path(__file__).parents[1] / "fixtures" / "data"
HANGS = "9^{9^{9^{9}}}"  # SymPy alone would take years


def reward(answer, gold, **kwargs):
    return math_reward([rf"So it is \boxed{{{answer}}}."], answer=[gold], **kwargs)[0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18"),
        ("18", r"\$18.00"),
        ("18", "$18"),
        ("18", r"18 \text{ dollars}"),
        ("18", "x = 18"),
        ("-5", "\u22125"),
        (r"\$5", "5"),
        ("1,000", "1000"),
        ("10080", r"10,\!080"),
        (r"10,\!080", "10080"),
        ("1000000", "1{,}000{,}000"),
        (r"11\%", "11"),
        (r"11\%", "0.11"),
        ("12.5", r"12.5\%"),
        ("60.0", r"60\%"),
        ("1.5", "1 1/2"),
        (r"\frac{3}{2}", r"x = 1\ 1/2"),
        ("-2.75", "$-2 3/4$"),
        ("2 3/4", r"2\frac34"),
        (r"16 \sqrt{3}", r"16\sqrt3"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"(3, \frac{\pi}{2})", r"\left(3, \pi/2\right)"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"90^\circ", "90"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        (r"(-\infty, 0]", r"(-\infty,0]"),
        ("y = -2x", "2x + y = 0"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_equal(gold, answer):
    assert reward(answer, gold) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "17"),
        ("1", "1 1/2"),
        ("1 1/2", "1"),
        (r"\frac{1}{2}", "1 1/2"),
        ("18", "18000"),
        ("18", "18.5"),
        ("18", r"18 \text{ or } 19"),
        ("0.5", "50"),
        (r"16 \sqrt{3}", "16"),
        (r"16 \sqrt{3}", r"3\sqrt{16}"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        (r"(3, \frac{\pi}{2})", r"(\frac{\pi}{2}, 3)"),
        (r"\text{Evelyn}", r"\text{Eve}"),
        ("(2, 3]", "(2, 3)"),
        # Read without a box, both sides of an equation are lost and the two planes are "equal"
        ("5x - 7y + 11z + 4 = 0", "-20x - 12y - 4z + 16 = 0"),
    ],
)
def test_different(gold, answer):
    assert reward(answer, gold) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3}, no: \boxed{4}", 1.0),
        (r"\boxed{4}, no: \boxed{3}", 0.0),
        (r"\boxed{4} \boxed{} \boxed{3", 1.0),  # neither the empty nor the cut one is an answer
        (r"\boxed{ \boxed{4} }", 1.0),
        (r"\boxed{$4$}", 1.0),
        (r"<answer>\boxed{4}</answer>", 1.0),
        ("<answer>3</answer> <answer> 4 </answer>", 1.0),
        (r"<answer>4</answer> so \boxed{3}", 0.0),  # a box before a tag
        ("<answer></answer>", 0.0),
        ("The final answer is $4$.", 1.0),
        ("The final answer is $3$.", 0.0),
        ("The final answer is $4 1/2$.", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_where_the_answer_is(text, expected):
    assert math_reward([text], answer=["4"]) == [expected]


@pytest.mark.parametrize(
    "gold",
    [
        4,
        4.0,
        np.int64(4),
        "4",
        " 4 ",
        "$4$",
        r"\(4\)",
        "$4",
        r"\boxed{4}",
        r"First $x = 3$, so $\boxed{4}$.",
        "2 + 2 = <<2+2=4>>4\n#### 4",
        "The answer is $4$.",
    ],
)
def test_kinds_of_gold_answers(gold):
    assert math_reward([r"\boxed{4}", r"\boxed{3}", r"\boxed{\sqrt{16}}"], answer=[gold] * 3) == [1.0, 0.0, 1.0]


def test_none_where_there_is_nothing_to_compare_with():
    golds = [None, "", float("nan"), r"\boxed{}", "costs $ or so", "4"]
    assert math_reward([r"\boxed{4}"] * 6, answer=golds) == [None] * 5 + [1.0]


def test_completions():
    texts = [r"\boxed{4}", None, r"\boxed{3}"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    more = {"prompts": ["?"] * 3, "completion_ids": [[1]] * 3, "trainer_state": None, "log_metric": print}
    assert math_reward(texts, answer=["4"] * 3) == [1.0, 0.0, 0.0]
    assert math_reward(completions=messages, answer=["4"] * 3, **more) == [1.0, 0.0, 0.0]
    assert math_reward(messages, solution=["4"] * 3) == [1.0, 0.0, 0.0]
    assert math_reward(messages, answer=["4"] * 3, solution=["A long story."] * 3) == [1.0, 0.0, 0.0]
    assert math_reward([[]], answer=["4"]) == [0.0]
    assert math_reward([], answer=[]) == []


def test_bad_input():
    with pytest.raises(ValueError, match=r"neither `answer` nor `solution`.*rename_column"):
        math_reward([r"\boxed{4}"], ground_truth=["4"])
    with pytest.raises(ValueError, match=r"`answer` must have one entry per completion \(1\), but has 2"):
        math_reward([r"\boxed{4}"], answer=["4", "4"])
    with pytest.raises(ValueError, match=r"`solution` must have one entry"):
        math_reward([r"\boxed{4}"], solution=[])
    with pytest.raises(ValueError, match=r"`answer`.* strings or numbers, but has \['4'\]"):
        math_reward([r"\boxed{4}"], answer=[["4"]])
    with pytest.raises(ValueError, match=r"`completions\[1\]` must be a string or a list of messages.*but has 4"):
        math_reward([r"\boxed{4}", 4], answer=["4"] * 2)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), 1e10, True, "2", None])
def test_a_time_limit_that_is_none(limit):
    with pytest.raises(ValueError, match="`time_limit` must be above 0 seconds and at most 3600.*but is"):
        math_reward([r"\boxed{4}"], answer=["4"], time_limit=limit)


def test_kinds_of_time_limits():
    for limit in (3600, np.float32(2.5), np.int64(3)):
        assert reward(r"\sqrt{16}", "4", time_limit=limit) == 1.0


# Real data


def test_gold_answers_of_math500_equal_themselves_and_no_other():
    golds = [rf"\boxed{{{gold}}}" for gold in json.loads((DATA / "math500_answers.json").read_text())]
    # Through math-verify, without the comparison of strings that comes first
    assert judge_all(list(zip(golds, golds, strict=True)), time_limit=10.0) == [1.0] * len(golds)
    others = judge_all(list(zip(golds, golds[1:] + golds[:1], strict=True)), time_limit=10.0)
    assert others == [0.0] * len(golds)


def decimal(text):
    try:
        return float(re.sub(r"[\\$,!%\s]", "", text))
    except ValueError:
        return None


def test_disagreements_between_math_verify_and_a_numeric_comparison():
    """
    Every response of LLaDA-8B (814 to GSM8K and MATH500) on which math-verify, as TRL calls it, and a comparison of
    the boxed answer as a decimal number disagree. docs/rewards.md explains the causes.
    """
    from trl.rewards import accuracy_reward

    rows = [json.loads(line) for line in (DATA / "llada8b_disagreements.jsonl").read_text().splitlines()]
    causes = Counter((row["file"], row["cause"]) for row in rows)
    assert causes == {
        ("gsm8k", "percent sign"): 9,
        ("gsm8k", "unit"): 4,
        ("gsm8k", "unsimplified number"): 1,
        ("math500", "gold is no decimal number"): 26,
        ("math500", "unit"): 2,
        ("math500", "unsimplified number"): 2,
    }
    golds = [row["ground_truth"] for row in rows]
    boxes = [re.findall(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", row["generation"])[-1] for row in rows]
    numeric = [decimal(box) is not None and decimal(box) == decimal(str(gold)) for box, gold in zip(boxes, golds)]
    completions = [[{"role": "assistant", "content": row["generation"]}] for row in rows]
    stock = accuracy_reward(completions, [rf"\boxed{{{gold}}}" for gold in golds])
    assert all(number != bool(verdict) for number, verdict in zip(numeric, stock, strict=True))
    assert numeric == [row["cause"] == "percent sign" for row in rows]
    # All of these answers are right
    assert math_reward(completions, answer=golds) == [1.0] * len(rows)


# Time limit, threads, processes


def in_thread(function, timeout):
    """Result of `function` in a thread; fails when it takes longer than `timeout` seconds."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(timeout)
    assert not thread.is_alive(), "hangs"
    return results[0]


def test_an_answer_that_hangs_is_wrong_and_the_others_are_judged():
    texts = [rf"\boxed{{{HANGS}}}", r"\boxed{\sqrt{16}}", r"\boxed{10000000!}", r"\boxed{\sqrt{9}}"]
    start = time.monotonic()
    rewards = in_thread(lambda: math_reward(texts, answer=["4"] * 4, time_limit=0.5), timeout=60)
    assert rewards == [0.0, 1.0, 0.0, 0.0]
    assert time.monotonic() - start > 0.4  # it was the time limit
    assert math_reward([r"\boxed{\sqrt{16}}"] * 2, answer=["4", "5"]) == [1.0, 0.0]  # new workers


def test_a_gold_answer_that_hangs():
    assert in_thread(lambda: reward("5", HANGS, time_limit=0.5), timeout=60) == 0.0
    assert reward(HANGS, HANGS) == 1.0


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 20_000, r"\boxed{" * 3_000 + "4" + "}" * 3_000, "<answer>" * 20_000, "x" * 200_000, "{" * 200_000],
)
def test_long_texts_are_cheap(text, monkeypatch):
    monkeypatch.setattr(math_module, "judge_all", lambda pairs, time_limit: [0.0] * len(pairs))
    start = time.process_time()
    math_reward([text], answer=["4"])
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("n", [10_000, 100_000])
def test_nested_boxes_take_linear_time_and_memory(n):
    text = r"\boxed{" * n + "1" + "}" * n
    start = time.process_time()
    assert len(find_boxes(text)) == n and last_box(text) == "1"
    assert math_reward([text, r"\boxed{1}", text], answer=["1", text, text]) == [1.0] * 3
    assert format_reward([text, text[len(r"\boxed{") :]]) == [0.0, 0.0]
    assert time.process_time() - start < n / 10_000  # seconds; the square took 1.6 and 160 for one of these
    tracemalloc.start()
    try:
        math_reward([text], answer=[text])
        assert tracemalloc.get_traced_memory()[1] < 400 * n  # bytes; the square took 65,000 n for the smaller one
    finally:
        tracemalloc.stop()


def test_what_is_judged(monkeypatch):
    judged = []

    def judge(pairs, time_limit):
        judged.extend(pairs)
        return [1.0] * len(pairs)

    monkeypatch.setattr(math_module, "judge_all", judge)
    answers = ["4", "5", "4.0", r"4\%", r"\text{four}", r"\text{four}", "1" * 2000, "x" * 2000]
    rewards = math_reward([rf"\boxed{{{answer}}}" for answer in answers], answer=["4"] * 8)
    assert rewards == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert judged == [(r"\boxed{\text{four}}", r"\boxed{4}")]  # equal pairs once, long repetitions never


def test_many_threads():
    golds = [str(n) for n in range(40)]
    calls = [[rf"\boxed{{\sqrt{{{(n + shift) ** 2}}}}}" for n in range(40)] for shift in (0, 1, 0, 1)]
    with ThreadPoolExecutor(4) as pool:
        rewards = list(pool.map(partial(math_reward, answer=golds), calls))
    assert rewards == [[1.0] * 40, [0.0] * 40] * 2


def test_signals_of_the_process_are_left_alone():
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF)
    assert reward(r"\sqrt{16}", "4") == 1.0
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_in_a_forked_child():
    assert reward(r"\sqrt{16}", "4") == 1.0  # the parent has workers
    child = os.fork()
    if child == 0:
        os._exit(0 if math_reward([r"\boxed{\sqrt{16}}", r"\boxed{\pi}"], answer=["4", "4"]) == [1.0, 0.0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reward(r"\sqrt{25}", "5") == 1.0


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "print('start')\n"
        "from dllm_trl.rewards import math_reward\n"
        "print(math_reward([r'\\boxed{\\sqrt{16}}'], answer=['4']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert result.stdout.splitlines() == ["start", "[1.0]"], result.stderr


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install dllm-trl\[math\]"):
        reward(r"\sqrt{16}", "4")


def test_a_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr("dllm_trl.rewards._judge._COMMAND", "raise SystemExit(1)")
    _pool.cache_clear()  # new threads, new workers
    with pytest.raises(RuntimeError, match="cannot start its worker"):
        reward(r"\sqrt{16}", "4")
    monkeypatch.undo()
    assert reward(r"\sqrt{16}", "4") == 1.0


@pytest.fixture
def worker_runs(monkeypatch):
    """Makes new workers run a line of Python before they are what they are."""

    def run_first(line):
        monkeypatch.setattr("dllm_trl.rewards._judge._COMMAND", f"{line}\n{_COMMAND}")
        _pool.cache_clear()  # new threads, new workers

    yield run_first
    monkeypatch.undo()
    _pool.cache_clear()


KILL = "__import__('os').kill(__import__('os').getpid(), {})"
AFTER = {"starting": "", "judging": "print('ready', flush=True) or input() and "}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("moment", AFTER)
def test_an_answer_whose_worker_is_killed_is_judged_again(worker_runs, tmp_path, caplog, moment, sign):
    marker = tmp_path / "killed"
    kill = AFTER[moment] + KILL.format(int(sign))
    worker_runs(f"import os\nif not os.path.exists({str(marker)!r}): open({str(marker)!r}, 'w').close(); {kill}")
    assert math_reward([r"\boxed{\sqrt{16}}"], answer=["4"]) == [1.0]
    assert marker.exists() and not caplog.records


@pytest.mark.parametrize("moment", AFTER)
def test_an_answer_whose_worker_is_killed_twice_does_not_count(worker_runs, caplog, moment):
    worker_runs(AFTER[moment] + KILL.format(9))
    texts = [r"\boxed{\sqrt{16}}", r"\boxed{4}"]
    assert math_reward(texts, answer=["4"] * 2) == [None, 1.0]
    assert "gives `None` for 1 of 1 answers: their worker process was killed twice (signal 9)" in caplog.text


def test_a_worker_that_is_killed_between_two_calls(worker_runs, caplog):
    worker_runs("")
    pool = _pool(os.getpid())
    assert judge_all([("", "4"), (r"\boxed{\sqrt{16}}", r"\boxed{4}")], 2.0) == [0.0, 1.0]
    workers = list(pool.map(lambda _: getattr(judge_module._thread, "worker", None), range(8)))
    for worker in {worker for worker in workers if worker}:
        worker.process.kill()
    assert judge_all([(r"\boxed{\sqrt{16}}", r"\boxed{4}")] * 4, 2.0) == [1.0] * 4
    assert not caplog.records


def test_a_worker_whose_timer_does_not_work_is_stopped_by_the_clock(worker_runs, monkeypatch, caplog):
    monkeypatch.setattr(judge_module, "SLACK", 0.2)
    worker_runs("print('ready', flush=True); import time; time.sleep(600)")
    rewards = in_thread(lambda: reward(r"\sqrt{16}", "4", time_limit=0.1), timeout=60)
    assert rewards is None
    assert "took more than 1 s on the clock" in caplog.text


def test_an_answer_that_hangs_where_the_caller_blocks_the_signal_of_the_timer(worker_runs):
    def blocked():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        worker_runs("")  # threads and processes inherit what is blocked
        return reward(HANGS, "4", time_limit=0.5)

    assert in_thread(blocked, timeout=10) == 0.0  # before the clock of `SLACK` seconds


def test_what_lies_on_the_import_path_of_the_caller(worker_runs, monkeypatch):
    monkeypatch.setattr(sys, "path", [Path("somewhere"), b"bytes", None, *sys.path])
    worker_runs("print('an import that prints')")
    assert reward(r"\sqrt{16}", "4") == 1.0
