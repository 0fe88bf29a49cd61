"""pwopt: makes exported ONNX models faster, exactly.

Folds sequences of operators that are linear across channels, verifies every result against onnxruntime,
and explains what it did and what it left alone.

Each name is imported when it is first used (scientific-python.org/specs/spec-0001): numpy, onnx and onnxruntime take
seconds to load.
"""

from typing import TYPE_CHECKING

import lazy_loader

from pwopt.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={"errors", "invariants", "passes"},
    submod_attrs={
        "errors": ["ModelError", "NotEquivalentError", "ProviderError", "PwoptError", "UsageError"],
        "evidence.equivalence": ["Equivalence"],
        "evidence.laws": ["Law"],
        "evidence.verify": ["verify"],
        "graph.files": ["load", "save"],
        "graph.model": ["Model"],
        "optimizing.batch": ["optimize_many"],
        "optimizing.optimizer": ["Result", "optimize"],
        "optimizing.record_tuning": ["profile"],
        "optimizing.request": ["Limits", "Measuring", "Request", "Writing"],
        "passes": ["PASSES"],
        "reporting.report": ["Report"],
        "rewriting.driver": ["Pass"],
        "rewriting.records": ["Rewrite", "Site", "Skip"],
        "running.bench": ["benchmark"],
        "running.huge_pages": ["HugePages", "use_huge_pages"],
        "selecting.inspection": ["inspect"],
        "selecting.weight_properties": ["properties"],
        "selecting.tuning_database": ["TuningDatabase"],
    },
)

if TYPE_CHECKING:
    from pwopt import errors as errors
    from pwopt import invariants as invariants
    from pwopt import passes as passes
    from pwopt.errors import ModelError as ModelError
    from pwopt.errors import NotEquivalentError as NotEquivalentError
    from pwopt.errors import ProviderError as ProviderError
    from pwopt.errors import PwoptError as PwoptError
    from pwopt.errors import UsageError as UsageError
    from pwopt.evidence.equivalence import Equivalence as Equivalence
    from pwopt.evidence.laws import Law as Law
    from pwopt.evidence.verify import verify as verify
    from pwopt.graph.files import load as load
    from pwopt.graph.files import save as save
    from pwopt.graph.model import Model as Model
    from pwopt.optimizing.batch import optimize_many as optimize_many
    from pwopt.optimizing.optimizer import Result as Result
    from pwopt.optimizing.optimizer import optimize as optimize
    from pwopt.optimizing.record_tuning import profile as profile
    from pwopt.optimizing.request import Limits as Limits
    from pwopt.optimizing.request import Measuring as Measuring
    from pwopt.optimizing.request import Request as Request
    from pwopt.optimizing.request import Writing as Writing
    from pwopt.passes import PASSES as PASSES
    from pwopt.reporting.report import Report as Report
    from pwopt.rewriting.driver import Pass as Pass
    from pwopt.rewriting.records import Rewrite as Rewrite
    from pwopt.rewriting.records import Site as Site
    from pwopt.rewriting.records import Skip as Skip
    from pwopt.running.bench import benchmark as benchmark
    from pwopt.running.huge_pages import HugePages as HugePages
    from pwopt.running.huge_pages import use_huge_pages as use_huge_pages
    from pwopt.selecting.inspection import inspect as inspect
    from pwopt.selecting.tuning_database import TuningDatabase as TuningDatabase
    from pwopt.selecting.weight_properties import properties as properties
