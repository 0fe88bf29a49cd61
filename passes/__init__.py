"""The rewrites: one file each, its identity in its docstring, tests/passes/test_<file>.py beside it in name."""

from __future__ import annotations

from pwopt.passes.channels_first import ChannelsFirst
from pwopt.passes.channels_last import ChannelsLast
from pwopt.passes.clean_up import CleanUp
from pwopt.passes.commute_gram import CommuteGram
from pwopt.passes.commute_spatial import CommuteSpatial
from pwopt.passes.drop_dead import DropDead
from pwopt.passes.factor_gates import FactorGates
from pwopt.passes.factor_ranks import FactorRanks
from pwopt.passes.focus import Focus
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.fold_borders import FoldBorders
from pwopt.passes.fold_chains import FoldChains
from pwopt.passes.frames import Frames
from pwopt.passes.hoist_crop import HoistCrop
from pwopt.passes.hoist_stride import HoistStride
from pwopt.passes.join_concat import JoinConcat
from pwopt.passes.join_views import JoinViews
from pwopt.passes.keep_layout import KeepLayout
from pwopt.passes.lower_rank import LowerRank
from pwopt.passes.merge_equal import MergeEqual, ShareConstants
from pwopt.passes.merge_siblings import MergeSiblings
from pwopt.passes.name_activations import NameActivations
from pwopt.passes.pad_channels import FillBlocks, FillTensorCores, PadChannels
from pwopt.passes.polyphase import FractionalStride, Polyphase
from pwopt.passes.settle_shapes import SettleShapes
from pwopt.passes.split_concat import SplitConcat
from pwopt.passes.split_multiplier import SplitMultiplier
from pwopt.passes.split_siblings import SplitSiblings
from pwopt.passes.sub_pixel import SubPixel
from pwopt.passes.sum_branches import SumBranches
from pwopt.passes.to_matmul import ToMatMul
from pwopt.passes.winograd import Winograd
from pwopt.rewriting.driver import Pass

#: The default pipeline, in order.
PASSES: tuple[type[Pass], ...] = (
    CleanUp,
    SettleShapes,
    JoinViews,
    MergeEqual,
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
    Focus,
    FactorRanks,
    FoldBorders,
    Polyphase,
    FractionalStride,
    SubPixel,
    SplitSiblings,
    SplitMultiplier,
    KeepLayout,
    PadChannels,
    FillBlocks,
    FillTensorCores,
    Frames,
    LowerRank,
    ChannelsFirst,
    ChannelsLast,
    MergeSiblings,
    SplitConcat,
    JoinConcat,
    Winograd,
    ToMatMul,
    ShareConstants,
)

__all__ = [
    "PASSES",
    "ChannelsFirst",
    "ChannelsLast",
    "CleanUp",
    "CommuteGram",
    "CommuteSpatial",
    "DropDead",
    "FactorGates",
    "FactorRanks",
    "FillBlocks",
    "FillTensorCores",
    "Focus",
    "FoldAffine",
    "FoldBorders",
    "FoldChains",
    "FractionalStride",
    "Frames",
    "HoistCrop",
    "HoistStride",
    "JoinConcat",
    "JoinViews",
    "KeepLayout",
    "LowerRank",
    "MergeEqual",
    "MergeSiblings",
    "NameActivations",
    "PadChannels",
    "Polyphase",
    "SettleShapes",
    "ShareConstants",
    "SplitConcat",
    "SplitMultiplier",
    "SplitSiblings",
    "SubPixel",
    "SumBranches",
    "ToMatMul",
    "Winograd",
]
