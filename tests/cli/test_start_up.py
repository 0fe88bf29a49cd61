"""What a command imports: heavy modules only if it uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers import MODELS

#: Modules that take long to import, each with what needs it.
HEAVY = {
    "html": "reports and notebooks",
    "jinja2": "reports",
    "matplotlib": "reports",
    "onnx.reference": "certificates, and folding constants",
    "platformdirs": "the cache of measurements",
    "pwopt.reporting.document": "reports",
    "rich.progress": "terminals",
}


def test_an_analytic_run_without_verification_imports_no_heavy_module(tmp_path: Path) -> None:
    program = f"""if True:
        import sys
        from pwopt.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as end:
            assert not end.code
        print("heavy:", sorted(set({sorted(HEAVY)}) & set(sys.modules)))
    """
    arguments = [str(MODELS / "linear_sequence.onnx"), "-o", str(tmp_path / "out.onnx"), "--cost", "analytic"]
    command = [sys.executable, "-c", program, "optimize", *arguments, "--no-verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
