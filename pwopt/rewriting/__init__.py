"""The driver of all passes, and the code that several of them share.

A pass is a subclass of `Pass`. It edits the graph through a `Rewriter`, and returns a `Rewrite`, a `Skip` or None.
"""

from pwopt.graph.reasons import Reason
from pwopt.rewriting.driver import CONTRACT, Pass, Rewriter, describe
from pwopt.rewriting.records import Certificate, Outcome, Rewrite, Site, Skip

__all__ = ["CONTRACT", "Certificate", "Outcome", "Pass", "Reason", "Rewrite", "Rewriter", "Site", "Skip", "describe"]
