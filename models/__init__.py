"""The gallery: eighteen uses of a pointwise convolution, and what pwopt does to each.

A 1×1 convolution multiplies the channels of every pixel by one matrix: `y[:, h, w] = W @ x[:, h, w] + b`. The same
arithmetic is called Linear over tokens, a process in a grid cell, a palette, a projection of spectra, a mix of
microphones. Whatever it is called, two of them after each other are one, and it may change places with whatever treats
all channels alike. Each system here is a small model spelled as an exporter writes it, with random but seeded weights;
depths and some widths are less than those of the paper, so that eighteen files fit in a repository. pwopt rewrites it,
and a property that the system stands for is measured on both models with onnxruntime.

A few words that return. A *channel* is an entry of the vector at one position (a pixel, a token, a node, an instant). A
map is *linear* if it is a matrix and a bias; ReLU, softmax and products of two tensors that both depend on the input
are not. *Multiply-adds* count the work of convolutions and matrix products. An operator is *left alone* where a rewrite
would change the answer, or cost more than it saves. Figures such as 2.1e-07, before and after, are a relative deviation
from the law; single precision rounds at 1e-7, and *exact* is none at all. Where a property is a quantity that stays
(a loss, a variance, labels), the cells show the quantity itself; where it has many values, how many they are before,
and after that they are the same, or the largest difference relative to the largest value.
"""
