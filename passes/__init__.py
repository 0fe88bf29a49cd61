"""The rewrites, one file each. A docstring begins with the identity; tests/passes/test_<file>.py tests the file."""

from __future__ import annotations

from pwopt.rewriting.driver import Pass
from pwopt.rewriting.lowering import Lowering

from .absorb_shuffle import AbsorbShuffle
from .channels_first import ChannelsFirst
from .channels_last import ChannelsLast
from .clean_up import CleanUp
from .commute_gram import CommuteGram
from .commute_spatial import CommuteSpatial
from .declare_shapes import DeclareShapes
from .drop_dead import DropDead
from .equalise_channels import EqualiseChannels
from .factor_gates import FactorGates
from .factor_ranks import FactorRanks
from .focus import Focus
from .fold_affine import FoldAffine
from .fold_borders import FoldBorders
from .fold_chains import FoldChains
from .fold_interpolation import FoldInterpolation
from .fold_quantised import FoldQuantised
from .fold_streams import FoldStreams
from .frames import Frames
from .hoist_crop import HoistCrop
from .hoist_stride import HoistStride
from .join_concat import JoinConcat
from .join_views import JoinViews
from .keep_layout import KeepLayout
from .lower_activations import LowerMish, LowerPRelu, LowerPReluByChannel, LowerSwish
from .lower_normalisations import LowerGroupNorm, LowerLRN, LowerResidual
from .lower_rank import LowerRank
from .lower_resize import LowerResize
from .merge_equal import MergeEqual, ShareConstants
from .merge_siblings import MergeSiblings
from .name_activations import NameActivations, NameHardSigmoid, NameSwish
from .pad_channels import FillBlocks, FillTensorCores, PadChannels
from .polyphase import FractionalStride, Polyphase
from .settle_shapes import SettleShapes
from .split_concat import SplitConcat
from .split_fused import SplitFused
from .split_multiplier import SplitMultiplier
from .split_siblings import SplitSiblings
from .sub_pixel import SubPixel
from .sum_branches import SumBranches
from .to_matmul import ToMatMul
from .unroll_frames import UnrollFrames
from .winograd import Winograd
from .write_gemm import WriteGemm

#: The lowering table (`pwopt.rewriting.lowering`): rows that bring spellings into one form before the other passes, and
#: rows that write what a kind of provider computes fastest after them.
NAMING: tuple[type[Lowering], ...] = (NameActivations, NameHardSigmoid, NameSwish, LowerPRelu)
LOWERING: tuple[type[Lowering], ...] = (
    LowerPReluByChannel,
    LowerResize,
    LowerResidual,
    LowerSwish,
    LowerMish,
    LowerLRN,
    LowerGroupNorm,
)

#: The default pipeline, in order.
PASSES: tuple[type[Pass], ...] = (
    CleanUp,
    SplitFused,
    SettleShapes,
    JoinViews,
    FoldQuantised,
    MergeEqual,
    *NAMING,
    FactorGates,
    FoldAffine,
    FoldStreams,
    DropDead,
    SumBranches,
    FoldChains,
    AbsorbShuffle,
    CommuteSpatial,
    CommuteGram,
    HoistStride,
    HoistCrop,
    Focus,
    FactorRanks,
    FoldBorders,
    Polyphase,
    FractionalStride,
    FoldInterpolation,
    SubPixel,
    SplitSiblings,
    SplitMultiplier,
    KeepLayout,
    PadChannels,
    FillBlocks,
    FillTensorCores,
    UnrollFrames,
    Frames,
    LowerRank,
    ChannelsFirst,
    ChannelsLast,
    MergeSiblings,
    SplitConcat,
    JoinConcat,
    Winograd,
    ToMatMul,
    *LOWERING,
    WriteGemm,
    DeclareShapes,
    EqualiseChannels,
    ShareConstants,
)

__all__ = [
    "LOWERING",
    "NAMING",
    "PASSES",
    "AbsorbShuffle",
    "ChannelsFirst",
    "ChannelsLast",
    "CleanUp",
    "CommuteGram",
    "CommuteSpatial",
    "DeclareShapes",
    "DropDead",
    "EqualiseChannels",
    "FactorGates",
    "FactorRanks",
    "FillBlocks",
    "FillTensorCores",
    "Focus",
    "FoldAffine",
    "FoldBorders",
    "FoldChains",
    "FoldInterpolation",
    "FoldQuantised",
    "FoldStreams",
    "FractionalStride",
    "Frames",
    "HoistCrop",
    "HoistStride",
    "JoinConcat",
    "JoinViews",
    "KeepLayout",
    "LowerGroupNorm",
    "LowerLRN",
    "LowerMish",
    "LowerPRelu",
    "LowerPReluByChannel",
    "LowerRank",
    "LowerResidual",
    "LowerResize",
    "LowerSwish",
    "MergeEqual",
    "MergeSiblings",
    "NameActivations",
    "NameHardSigmoid",
    "NameSwish",
    "PadChannels",
    "Polyphase",
    "SettleShapes",
    "ShareConstants",
    "SplitConcat",
    "SplitFused",
    "SplitMultiplier",
    "SplitSiblings",
    "SubPixel",
    "SumBranches",
    "ToMatMul",
    "UnrollFrames",
    "Winograd",
    "WriteGemm",
]
