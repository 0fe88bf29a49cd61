#!/usr/bin/env python3
"""Record how often each kind of measured rewrite pays on this machine, for the table that ships with pwopt.

    python benchmarks/answer_time.py FOLDER... --effort thorough --keep CACHES
    python benchmarks/priors.py CACHES [--provider cpu]

The first command optimises models with an empty cache each, and keeps the caches; the second counts what they hold into
pwopt/selecting/priors.json, in the place of what this class of processors had there, and names the machine and the
models. The table is an order and a guess: a kind that hardly ever paid in many cases is not tried, which `--effort thorough`
overrules, and no kind is kept by it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from pwopt.running.installation import describe_machine
from pwopt.running.providers import as_provider
from pwopt.selecting import priors, tuning_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    entries = []
    for folder in sorted(p for p in options.caches.iterdir() if p.is_dir()):
        os.environ[tuning_cache.FOLDER_VARIABLE] = str(folder)
        entries += [e for e in tuning_cache.read_records() if e.model]
    found = priors.count_decisions(entries)
    content = priors.read_table()
    key = f"{as_provider(options.provider).kind} {priors.classify_processor()}"
    machine = {
        k: v
        for k, v in describe_machine(as_provider(options.provider)).items()
        if k in ("pwopt", "onnxruntime", "cpu", "cores")
    }
    models = sorted({e.name for e in entries})
    content["machines"] = [m for m in content["machines"] if m["for"] != key]
    content["machines"].append({"for": key, **machine, "date": max(e.date for e in entries)[:10], "models": models})
    content["priors"][key] = {name: [p.decided, p.kept, round(p.gain, 4)] for name, p in sorted(found.items())}
    target = Path(priors.__file__).with_name("priors.json")
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, p in sorted(found.items()):
        print(f"{name}: {p.kept} of {p.decided} kept, {p.expected_gain:+.4f} expected")


if __name__ == "__main__":
    main()
