"""Whether two models give the same answers, and where not.

`verify` compares whole models on inputs, and `certify` compares the operators that one rewrite replaced with the new
ones, on its own probes. `operators` and `runtime_operators`, imported here, register what `evaluation` can compute.
"""

from pwopt.evidence import operators, runtime_operators

__all__ = ["operators", "runtime_operators"]
