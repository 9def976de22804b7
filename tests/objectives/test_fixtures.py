"""Every file of numbers is read by some test."""

import re
from pathlib import Path


TESTS = Path(__file__).parents[1]
# The reference trainer's grid, on which its rollouts do not lie: `test_trace` compares what the two have in common
ELSEWHERE = {"trace_rounds_block"}


def test_every_fixture_is_read(oracles_dir):
    there = {path.stem for path in oracles_dir.glob("*.json")}
    modules = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    words = set(re.findall(r"\"(\w+)(?:\.json)?\"", " ".join(path.read_text() for path in modules)))
    read = there & words
    assert there >= ELSEWHERE and there - read <= ELSEWHERE, "no test reads these"
