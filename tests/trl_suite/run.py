"""
Runs TRL's own tests of `GRPOTrainer` and `SFTTrainer` on stock TRL and on the trainers of this package, offline, and
says which of them pass on the former and fail on the latter.

    python tests/trl_suite/run.py --trl-repo PATH                   # a checkout of TRL's repository, or a bare clone
    python tests/trl_suite/run.py --trl-repo PATH -k peft           # some of the tests
    python tests/trl_suite/run.py --trl-repo PATH --ours -k peft    # on ours only, with tracebacks

The tests are read from the tag of the installed TRL, or from the newest commit if the clone lacks it. They are
unpacked into a temporary folder and run unchanged: nothing of them is part of this repository.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.trl_suite.refused import listed, refusal  # noqa: E402
from tests.trl_suite.stand_ins import WIDE_NAMES, names_in, write_stand_ins  # noqa: E402


FILES = {"grpo": "test_grpo_trainer.py", "sft": "test_sft_trainer.py"}


def git(repository: Path, *arguments: str) -> bytes:
    folder = repository / ".git" if (repository / ".git").exists() else repository
    return subprocess.run(["git", f"--git-dir={folder}", *arguments], check=True, capture_output=True).stdout


def unpack_tests(repository: Path, ref: str | None, target: Path) -> str:
    """TRL's `tests` folder as `target`, which must not be called `tests`: there is a package of that name here."""
    tags = git(repository, "tag").decode().split()
    wanted = f"v{version('trl')}"
    ref = ref or (wanted if wanted in tags else "HEAD")
    with tarfile.open(fileobj=BytesIO(git(repository, "archive", ref, "tests"))) as archive:
        archive.extractall(target.parent, filter="data")
    (target.parent / "tests").rename(target)
    return git(repository, "log", "-1", "--format=%h of %cs, %D", ref).decode().strip().rstrip(", ")


def run(trainers: str, file: Path, folder: Path, args) -> dict[str, dict]:
    """Outcome of each test of one file."""
    results = folder / f"{trainers}-{file.stem}.jsonl"
    results.touch()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.trl_suite.plugin", "-p", "no:cacheprovider"]
    command += [str(file), "-c", str(folder / "pytest.ini"), "--rootdir", str(folder), f"--basetemp={folder / 'tmp'}"]
    command += ["--trainers", trainers, "--stand-ins", str(folder / trainers), "--results", str(results)]
    command += ["--seconds", str(args.seconds), "--tb", "long" if args.ours else "line", "--no-header"]
    command += ["-k", args.k] if args.k else []
    output = None if args.ours else subprocess.PIPE
    print(f"{trainers}: {file.name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in (0, 1, 5) and not args.ours:  # neither all passed, nor some failed, nor none chosen
        print(done.stdout[-5000:], file=sys.stderr)
    return {record["test"]: record for record in map(json.loads, results.read_text().splitlines())}


def compare(stock: dict, ours: dict) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Of the tests that pass on stock TRL: those that pass on ours, that are refused, and that fail, with reasons."""
    same, refused, failed = [], [], []
    for name in (name for name, record in stock.items() if record["outcome"] == "passed"):
        record = ours.get(name, {"outcome": "crashed", "reason": ""})
        found = refusal(name, record["reason"])
        if record["outcome"] == "passed":
            same.append(name)
        elif found is not None:
            refused.append((name, found.feature))
        else:
            failed.append((name, f"{record['outcome']}: {record['reason']}".rstrip(": ")))
    return same, refused, failed


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n{title}: {len(rows) or 'none'}")
    for name, reason in rows:
        print(f"  {name}\n      {reason[:300]}")


def print_not_comparable(stock: dict) -> None:
    """The tests that do not pass on stock TRL here, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, record in stock.items():
        if record["outcome"] != "passed":
            reason = re.sub(r"0x\w+|'[^']*'", "...", record["reason"].removeprefix("Skipped: "))[:140]
            reasons.setdefault((record["outcome"], reason), []).append(name.split("::")[-1].split("[")[0])
    print(f"\nNot comparable, because they do not pass on stock TRL here: {sum(map(len, reasons.values())) or 'none'}")
    for (outcome, reason), names in sorted(reasons.items()):
        print(f"  {len(names)} {outcome}: {reason}\n      {', '.join(dict.fromkeys(names))}"[:500])


def report(stock: dict, ours: dict | None) -> int:
    """Prints the tables. The exit status: 1 if a test passes on stock TRL and fails on ours without a refusal."""
    print_not_comparable(stock)
    passing = sum(record["outcome"] == "passed" for record in stock.values())
    if ours is None:
        print(f"\n{passing} of {len(stock)} tests pass on stock TRL.")
        return 0
    same, refused, failed = compare(stock, ours)
    print_rows("Listed as refused, but pass", [(name, item.feature) for name in same if (item := listed(name))])
    print_rows("Refused", refused)
    print_rows("FAIL", failed)
    print(
        f"\n{passing} of {len(stock)} tests pass on stock TRL. Of these, {len(same)} pass on ours, {len(refused)} are "
        f"refused, {len(failed)} fail."
    )
    return min(len(failed), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-repo", type=Path, required=True, help="a checkout or bare clone of TRL's repository")
    parser.add_argument("--ref", help="commit of the tests; default: the tag of the installed TRL, else HEAD")
    parser.add_argument("--only", choices=FILES, help="one of the two files")
    parser.add_argument("--stock", action="store_true", help="run stock TRL only")
    parser.add_argument("--ours", action="store_true", help="run ours only, and show the output")
    parser.add_argument("-k", help="which tests, as in pytest")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tiny models' weights")
    parser.add_argument("--save", type=Path, help="folder for the outcomes; those of stock TRL found there are reused")
    args = parser.parse_args()
    files = [FILES[args.only]] if args.only else list(FILES.values())
    sides = ["ours"] if args.ours else ["stock"] if args.stock else ["stock", "ours"]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = folder / "trl_tests"
        print(
            f"TRL {version('trl')} is installed; its tests are those of {unpack_tests(args.trl_repo, args.ref, tests)}"
        )
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    low_priority\n")
        names = names_in([(tests / file).read_text() for file in files])
        outcomes: dict[str, dict[str, dict]] = {side: {} for side in sides}
        for side in sides:
            missing = write_stand_ins(folder / side / "narrow", names, side == "ours", seed=args.seed)
            write_stand_ins(folder / side / "wide", WIDE_NAMES, side == "ours", wide=True, seed=args.seed)
            for file in files:
                saved = args.save / f"{side}-{file}.json" if args.save and not args.k else None
                if saved and side == "stock" and saved.exists():
                    found = json.loads(saved.read_text())
                else:
                    found = run(side, tests / file, folder, args)
                if saved:
                    saved.parent.mkdir(parents=True, exist_ok=True)
                    saved.write_text(json.dumps(found, indent=1))
                outcomes[side] |= found
        print(f"Without a stand-in: {', '.join(f'{name} ({reason})' for name, reason in missing.items()) or 'none'}")
        return 0 if args.ours else report(outcomes["stock"], outcomes.get("ours"))


if __name__ == "__main__":
    raise SystemExit(main())
