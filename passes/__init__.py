"""The rewrites: one file each, its identity in its docstring, its test beside it in name (tests/test_<file>.py)."""

from __future__ import annotations

from pwopt.passes.channels_last import ChannelsLast
from pwopt.passes.clean_up import CleanUp
from pwopt.passes.commute_gram import CommuteGram
from pwopt.passes.commute_spatial import CommuteSpatial
from pwopt.passes.drop_dead import DropDead
from pwopt.passes.factor_gates import FactorGates
from pwopt.passes.factor_ranks import FactorRanks
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.fold_chains import FoldChains
from pwopt.passes.hoist_crop import HoistCrop
from pwopt.passes.hoist_stride import HoistStride
from pwopt.passes.join_concat import JoinConcat
from pwopt.passes.lower_rank import LowerRank
from pwopt.passes.merge_siblings import MergeSiblings
from pwopt.passes.name_activations import NameActivations
from pwopt.passes.split_concat import SplitConcat
from pwopt.passes.sum_branches import SumBranches
from pwopt.rewrite import Pass

#: The default pipeline, in order.
PASSES: tuple[type[Pass], ...] = (
    CleanUp,
    NameActivations,
    FactorGates,
    FoldAffine,
    DropDead,
    SumBranches,
    FoldChains,
    CommuteSpatial,
    CommuteGram,
    HoistStride,
    HoistCrop,
    FactorRanks,
    LowerRank,
    ChannelsLast,
    MergeSiblings,
    SplitConcat,
    JoinConcat,
)

__all__ = [
    "PASSES",
    "ChannelsLast",
    "CleanUp",
    "CommuteGram",
    "CommuteSpatial",
    "DropDead",
    "FactorGates",
    "FactorRanks",
    "FoldAffine",
    "FoldChains",
    "HoistCrop",
    "HoistStride",
    "JoinConcat",
    "LowerRank",
    "MergeSiblings",
    "NameActivations",
    "SplitConcat",
    "SumBranches",
]
