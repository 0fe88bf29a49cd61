"""The driver of all rewrites, and what several of them share.

A pass is a subclass of `Pass`; it edits through a `Rewriter` and answers with a `Rewrite` or a `Skip`.
"""

from pwopt.rewriting.driver import CONTRACT, Pass, Rewriter, describe
from pwopt.rewriting.records import Certificate, Outcome, Rewrite, Site, Skip

__all__ = ["CONTRACT", "Certificate", "Outcome", "Pass", "Rewrite", "Rewriter", "Site", "Skip", "describe"]
