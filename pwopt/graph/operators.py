"""What pwopt knows about each of ONNX's operators: one row per operator.

Add a row to teach pwopt a new operator. An operator without a row has none of the traits, so no pass moves anything
across it. `pwopt.evidence` deliberately keeps a table of its own: it must not rely on what it judges.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The traits, and the numbers that a row may give.
TRAIT_MEANINGS = {
    "elementwise": "a function of each element of its first input; other inputs hold parameters",
    "slope": "elementwise, with this Lipschitz constant; passes move such functions across maps",
    "same-shape": "the output has the shape of the first input, as that of every elementwise operator has",
    "arithmetic": "adds, subtracts, multiplies or divides tensors element by element",
    "broadcasts": "all operands are broadcast to each other",
    "view": "keeps the elements and their order, and changes the shape",
    "moves": "the output holds elements of the first input (Concat: of any input), as that of every view does",
    "weighted": "a linear map whose weights are an input",
    "sums": "adds many elements; it may start with +0, and in float16 the sum may overflow",
    "pools": "reduces windows, whose last one `ceil_mode` may add",
    "softmax": "normalises along the axis that the attribute `axis` gives",
    "reduction": "reduces axes that are an attribute or an input",
    "axes": "since this opset, the axes are an input and no longer an attribute",
    "bias": "the index of the input that is added last",
    "blind": "the result is the same number for −0 and +0, in every input",
    "blind-input": "the result is the same number for −0 and +0 in the input with this index",
    "keeps-zero": "at most the sign of a zero in the result depends on the sign of a zero in an input",
    "keeps-first-zero": "the same, for the first input only",
    "tells-zero": "the result for a number near zero differs from the result for zero: a step or a pole at zero",
    "hides-zero": "the result for zero is an ordinary number, so that adding a tiny number does not change it",
    "bounded": "no larger than its inputs and weights make it; every operator with a slope is bounded",
    "foldable": "deterministic, and onnx's reference evaluator computes on constants what onnxruntime computes",
    "random": "gives another result each time (Dropout: during training)",
    "whole-blocks": "onnxruntime's CPU provider keeps it in the blocked layout only if all blocks of channels are full",
    "quantised": "computes with quantised numbers",
}

_ROWS = """
Abs                        slope=1 blind foldable
Acos                       same-shape blind hides-zero foldable
Acosh                      foldable
Add                        arithmetic broadcasts keeps-zero bounded foldable
AffineGrid                 foldable
And                        broadcasts blind foldable tells-zero
ArgMax                     blind tells-zero foldable
ArgMin                     blind tells-zero foldable
Asin                       same-shape keeps-zero foldable
Asinh                      same-shape keeps-zero foldable
Atan                       same-shape keeps-zero foldable
Atanh                      same-shape keeps-zero foldable
AveragePool                pools sums keeps-zero bounded whole-blocks foldable
BatchNormalization         same-shape sums bias=2 keeps-zero bounded
Bernoulli                  random tells-zero
BitShift                   foldable
BitwiseAnd                 foldable
BitwiseNot                 foldable
BitwiseOr                  foldable
BitwiseXor                 foldable
BlackmanWindow             foldable
Cast                       same-shape moves keeps-zero bounded foldable
CastLike                   keeps-zero foldable
Ceil                       elementwise keeps-zero foldable tells-zero
Celu                       slope=1 keeps-zero foldable
CenterCropPad              foldable
Clip                       slope=1 keeps-zero foldable
Concat                     moves keeps-zero bounded foldable whole-blocks
Constant                   bounded
ConstantOfShape            foldable
Conv                       weighted sums bias=2 keeps-zero bounded foldable
ConvInteger                quantised
ConvTranspose              weighted sums bias=2 keeps-zero bounded foldable
Cos                        elementwise blind hides-zero foldable
Cosh                       same-shape blind hides-zero foldable
CumSum                     same-shape keeps-zero foldable
DFT                        foldable
DepthToSpace               keeps-zero foldable
DequantizeLinear           keeps-first-zero quantised
Det                        foldable
Div                        arithmetic broadcasts keeps-first-zero bounded foldable
Dropout                    same-shape keeps-zero random
DynamicQuantizeLinear      quantised tells-zero
Einsum                     keeps-zero foldable
Elu                        slope=1 keeps-zero foldable
Equal                      broadcasts blind bounded foldable tells-zero
Erf                        slope=1.13 keeps-zero foldable
Exp                        slope=inf blind foldable hides-zero
Expand                     moves keeps-zero foldable
EyeLike                    foldable
Flatten                    view keeps-zero bounded foldable
Floor                      elementwise keeps-zero foldable tells-zero
GRU                        keeps-zero
Gather                     keeps-zero bounded foldable
GatherElements             keeps-zero foldable
GatherND                   keeps-zero foldable
Gelu                       slope=1.13 keeps-zero foldable
Gemm                       weighted sums keeps-zero bounded foldable
GlobalAveragePool          sums keeps-zero bounded whole-blocks foldable
GlobalMaxPool              keeps-zero whole-blocks foldable
Greater                    broadcasts blind foldable tells-zero
GreaterOrEqual             broadcasts blind foldable tells-zero
GroupNormalization         same-shape bias=2 keeps-zero
HammingWindow              foldable
HannWindow                 foldable
HardSigmoid                slope=1 keeps-zero foldable
HardSwish                  slope=1.5 keeps-zero foldable
Hardmax                    same-shape softmax tells-zero foldable
Identity                   same-shape moves keeps-zero bounded
InstanceNormalization      same-shape bias=2 keeps-zero foldable
IsInf                      blind hides-zero foldable
IsNaN                      blind hides-zero foldable
LRN                        same-shape keeps-zero
LSTM                       keeps-zero
LayerNormalization         same-shape bias=2 keeps-zero bounded foldable
LeakyRelu                  slope=1 keeps-zero foldable
Less                       broadcasts blind foldable tells-zero
LessOrEqual                broadcasts blind foldable tells-zero
Log                        elementwise blind foldable tells-zero
LogSoftmax                 same-shape softmax blind hides-zero foldable
LpNormalization            same-shape keeps-zero tells-zero
LpPool                     pools
MatMul                     weighted sums keeps-zero bounded foldable
MatMulInteger              quantised
Max                        broadcasts keeps-zero bounded foldable
MaxPool                    pools keeps-zero bounded whole-blocks foldable
Mean                       broadcasts keeps-zero foldable
MeanVarianceNormalization  same-shape keeps-zero
MelWeightMatrix            foldable
Min                        broadcasts keeps-zero bounded foldable
Mish                       slope=1.1 keeps-zero foldable
Mod                        broadcasts foldable tells-zero
Mul                        arithmetic broadcasts keeps-zero bounded foldable
Multinomial                random tells-zero
Neg                        slope=1 keeps-zero foldable
NonZero                    blind tells-zero foldable
Not                        blind foldable tells-zero
OneHot                     foldable
Or                         broadcasts blind foldable tells-zero
PRelu                      same-shape keeps-zero bounded foldable
Pad                        keeps-zero foldable
Pow                        broadcasts blind-input=1 bounded foldable
QuantizeLinear             blind-input=0 quantised hides-zero
RMSNormalization           same-shape keeps-zero
RNN                        keeps-zero
RandomNormal               random
RandomNormalLike           random
RandomUniform              random
RandomUniformLike          random
Range                      foldable
Reciprocal                 elementwise foldable tells-zero
ReduceL1                   reduction axes=18 blind foldable
ReduceL2                   reduction axes=18 blind foldable
ReduceLogSum               foldable
ReduceLogSumExp            axes=18 blind foldable
ReduceMax                  reduction axes=18 keeps-zero foldable
ReduceMean                 reduction axes=18 sums keeps-zero bounded whole-blocks foldable
ReduceMin                  reduction axes=18 keeps-zero foldable
ReduceProd                 axes=18 foldable
ReduceSum                  reduction axes=13 sums keeps-zero bounded foldable
ReduceSumSquare            reduction axes=18 blind foldable
Relu                       slope=1 keeps-zero foldable
Reshape                    view keeps-zero bounded foldable
Resize                     keeps-first-zero foldable
ReverseSequence            keeps-zero foldable
Round                      same-shape keeps-zero hides-zero foldable
ScatterElements            keeps-zero foldable
ScatterND                  keeps-zero foldable
Selu                       slope=1.76 keeps-zero foldable
Shape                      blind bounded foldable hides-zero
Shrink                     foldable
Sigmoid                    slope=0.25 blind hides-zero foldable
Sign                       same-shape keeps-zero tells-zero foldable
Sin                        elementwise keeps-zero foldable
Sinh                       same-shape keeps-zero foldable
Size                       blind bounded foldable hides-zero
Slice                      moves keeps-zero bounded foldable
Softmax                    same-shape softmax blind bounded hides-zero foldable
Softplus                   slope=1 blind hides-zero foldable
Softsign                   slope=1 keeps-zero foldable
SpaceToDepth               keeps-zero foldable
Split                      moves keeps-zero bounded foldable
Sqrt                       elementwise keeps-zero bounded foldable
Squeeze                    view axes=13 keeps-zero bounded foldable
Sub                        arithmetic broadcasts keeps-zero bounded foldable
Sum                        arithmetic broadcasts keeps-zero foldable
Swish                      slope=1.1 keeps-zero
Tan                        same-shape keeps-zero foldable
Tanh                       slope=1 keeps-zero foldable
ThresholdedRelu            slope=inf keeps-zero foldable
Tile                       moves keeps-zero foldable
TopK                       keeps-zero tells-zero foldable
Transpose                  moves keeps-zero bounded foldable
Trilu                      same-shape keeps-zero foldable
Unsqueeze                  view axes=13 keeps-zero bounded foldable
Upsample                   keeps-first-zero
Where                      broadcasts keeps-zero bounded foldable
Xor                        broadcasts blind foldable tells-zero
"""

#: Operators of onnxruntime's own domain, com.microsoft.
_MICROSOFT_ROWS = """
BiasAdd                          same-shape
BiasDropout                      same-shape
BiasGelu                         same-shape
BiasSoftmax                      same-shape
FastGelu                         same-shape
Gelu                             same-shape
GroupNorm                        same-shape
QLinearLeakyRelu                 same-shape
QLinearSigmoid                   same-shape
QLinearSoftmax                   same-shape
QuickGelu                        same-shape
RotaryEmbedding                  same-shape
SkipGroupNorm                    same-shape
SkipLayerNormalization           same-shape
SkipSimplifiedLayerNormalization same-shape
Trilu                            same-shape
"""


def _parse(rows: str) -> dict[str, dict[str, float]]:
    """Operator → trait → its number, 1 for a trait without one."""
    table: dict[str, dict[str, float]] = {}
    for row in filter(None, rows.splitlines()):
        operator, *words = row.split()
        pairs = [word.partition("=") for word in words]
        unknown = {trait for trait, _, _ in pairs} - TRAIT_MEANINGS.keys()
        if unknown or operator in table:
            raise ValueError(f"the row of {operator} is there twice, or has unknown traits: {', '.join(unknown)}")
        table[operator] = {trait: float(number or 1) for trait, _, number in pairs}
    return table


_TABLE = _parse(_ROWS)
_MICROSOFT_TABLE = _parse(_MICROSOFT_ROWS)


def _having(*traits: str) -> frozenset[str]:
    """The operators with at least one of these traits."""
    assert TRAIT_MEANINGS.keys() >= set(traits)
    return frozenset(op for op, row in _TABLE.items() if not row.keys().isdisjoint(traits))


def _numbers(trait: str) -> Mapping[str, int]:
    """Operator → the whole number that its row gives for a trait."""
    assert trait in TRAIT_MEANINGS
    return {op: int(row[trait]) for op, row in _TABLE.items() if trait in row}


#: Elementwise functions that passes move across maps, each with its Lipschitz constant.
ACTIVATIONS: Mapping[str, float] = {op: row["slope"] for op, row in _TABLE.items() if "slope" in row}
ELEMENTWISE = _having("elementwise", "slope")
SAME_SHAPE = _having("elementwise", "slope", "same-shape")
#: The same for operators of the domain com.microsoft.
MICROSOFT_SAME_SHAPE = frozenset(op for op, row in _MICROSOFT_TABLE.items() if "same-shape" in row)
ARITHMETIC = _having("arithmetic")
BROADCASTS = _having("broadcasts")
VIEWS = _having("view")
MOVES = _having("moves", "view")
WEIGHTED_OPERATORS = _having("weighted")
SUMS = _having("sums")
POOLS = _having("pools")
SOFTMAXES = _having("softmax")
REDUCTIONS = _having("reduction")
#: The opset since which the axes are an input.
AXES_SINCE = _numbers("axes")
BIAS_INPUTS = _numbers("bias")
ZERO_BLIND = _having("blind")
ZERO_BLIND_INPUTS = _numbers("blind-input")
ZERO_KEEPING = _having("keeps-zero")
FIRST_ZERO_KEEPING = _having("keeps-first-zero")
TELLS_ZERO = _having("tells-zero")
HIDES_ZERO = _having("hides-zero")
BOUNDED = _having("bounded", "slope")
FOLDABLE = _having("foldable")
RANDOM = _having("random")
WHOLE_BLOCKS = _having("whole-blocks")
QUANTISED = _having("quantised")
