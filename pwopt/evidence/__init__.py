"""Whether two models give the same answers, and where not.

`verify` compares whole models on inputs, `certify` the region of one rewrite on probes of its own; `operators`,
imported here, registers what `evaluation` knows.
"""

from pwopt.evidence import operators

__all__ = ["operators"]
