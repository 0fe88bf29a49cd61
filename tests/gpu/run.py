#!/usr/bin/env python3
"""What pwopt does on a graphics card, in one short sitting: every check in order of worth, written down as it goes.

    python tests/gpu/run.py --wheels FOLDER --out FOLDER [--models FOLDER] [--provider cuda] [--minutes 8]

--provider is cuda, tensorrt, or a plug-in provider such as tensorrt-rtx or webgpu, whose wheel is in FOLDER.

FOLDER holds wheels of what the machine lacks (onnxruntime-gpu, pwopt's few dependencies, perhaps pwopt itself); one that
was split into numbered pieces (`NAME.whl.aa`, `NAME.whl.ab`…) is joined. They are installed into a folder of their own,
without a network, and leave the machine's own packages alone; without a wheel of pwopt, this checkout is used. Each check
runs in a process of its own; one that needs a package which is missing is not run, and names the package; what fails, crashes or takes too long is reported as that, and the rest runs on. After
each, `results.json` and `results.md` are written anew, so that being stopped loses nothing; it ends by itself within
--minutes. `--provider cpu` and `--provider openvino` run the same on a machine without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Where the checks find what they share with the suite.
BESIDE = (ROOT / "tests", ROOT / "benchmarks")
#: Seconds kept back to write down what was found.
RESERVE = 5.0


@dataclass
class Outcome:
    """What a check found: passed, failed, crashed, stopped (out of time) or not run."""

    check: str
    status: str
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def join_pieces(wheels: Path, into: Path) -> list[Path]:
    """Wheels of a folder, those in pieces joined in the order of their names."""
    found = list(wheels.glob("*.whl"))
    pieces: dict[str, list[Path]] = {}
    for piece in sorted(wheels.glob("*.whl.*")):
        pieces.setdefault(piece.name.rpartition(".")[0], []).append(piece)
    for name, parts in pieces.items():
        with open(into / name, "wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        found.append(into / name)
    return found


def install(wheels: Path | None, into: Path) -> None:
    """Install wheels into a folder, and pwopt as it stands here if it is not among them."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = join_pieces(wheels, Path(folder)) if wheels is not None else []
        if found:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
            subprocess.run([*command, "--target", str(into), *map(str, found)], check=True)
    if not (into / "pwopt").exists():
        shutil.copytree(ROOT / "pwopt", into / "pwopt", ignore=shutil.ignore_patterns("passes", "__pycache__"))
        shutil.copytree(ROOT / "passes", into / "pwopt" / "passes", ignore=shutil.ignore_patterns("__pycache__"))


def listed(arguments: list[str], environment: dict[str, str]) -> list[str]:
    """Names of the checks, in order of worth."""
    command = [sys.executable, str(HERE / "checks.py"), "--list", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def run(check: str, arguments: list[str], environment: dict[str, str], seconds: float) -> Outcome:
    """One check in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, str(HERE / "checks.py"), check, *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(check, "stopped", time.perf_counter() - start, reason=f"{seconds:.0f} seconds were over")
    spent = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Outcome(check, "crashed", spent, reason=f"exit code {done.returncode}: {last}")
    return Outcome(check, found.pop("status"), spent, found, found.pop("reason", ""))


def write(outcomes: list[Outcome], out: Path, about: dict[str, Any]) -> None:
    """results.json and results.md, each whole or not at all."""
    content = json.dumps({**about, "checks": [asdict(o) for o in outcomes]}, indent=1, ensure_ascii=False, default=str)
    said = "\n".join(f"* {key}: {value}" for key, value in about.items())
    rows = [f"| {o.check} | {o.status} | {o.seconds:.1f} s | {_brief(o)} |" for o in outcomes]
    table = "\n".join(["| check | | | found |", "|---|---|---|---|", *rows])
    for name, text in (("results.json", content), ("results.md", f"{said}\n\n{table}\n")):
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)


def _brief(outcome: Outcome) -> str:
    figures = ", ".join(f"{k} {v}" for k, v in outcome.found.items() if isinstance(v, (str, int, float, bool)))
    return "; ".join(filter(None, (outcome.reason, figures))).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--into", type=Path, help="where to install them; a temporary folder by default")
    parser.add_argument("--models", type=Path, help="models to optimise besides those that are built")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", action="append", help="run just this check; repeatable")
    parser.add_argument("--quick", action="store_true", help="small models and short races, to try the kit itself")
    parser.add_argument("--plant", action="append", default=[], help="let this check fail, to see that it is told")
    given = parser.parse_args()
    deadline = time.perf_counter() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pwopt-gpu-") as scratch:
        into = given.into or Path(scratch) / "site"
        install(given.wheels, into)
        inherited = os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(into), *map(str, BESIDE), inherited))),
            "PWOPT_CACHE": str(Path(scratch) / "cache"),
        }
        arguments = ["--provider", given.provider, "--scratch", scratch]
        arguments += ["--models", str(given.models)] if given.models else []
        arguments += ["--wheels", str(given.wheels)] if given.wheels else []
        arguments += ["--quick"] if given.quick else []
        arguments += [word for name in given.plant for word in ("--plant", name)]
        about = {"provider": given.provider, "minutes": given.minutes, "date": time.strftime("%Y-%m-%d")}
        outcomes: list[Outcome] = []
        for check in given.only or listed(arguments, environment):
            left = deadline - time.perf_counter() - RESERVE
            done = run(check, arguments, environment, left) if left > 0 else Outcome(check, "not run", reason="no time")
            outcomes.append(done)
            print(f"{done.status:8} {check}  {done.seconds:.1f} s  {_brief(done)}", flush=True)
            write(outcomes, given.out, about)
    return 0 if all(o.status in ("passed", "not run", "stopped") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
