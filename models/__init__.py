"""The gallery: eighteen uses of the pointwise convolution, and what pwopt does to each.

A 1×1 convolution multiplies the channels of every pixel by one matrix: `y[:, h, w] = W @ x[:, h, w] + b`. Other fields
do the same arithmetic under other names: a Linear layer over tokens, a process in a grid cell, a palette, a projection
of spectra, a mix of microphones. The rules are the same everywhere. Two consecutive maps are one map. A map may change
places with any operator that treats all channels alike.

Each system here is a small model, spelled as an exporter writes it, with random but seeded weights. Depths and some
widths are smaller than in the paper, so that eighteen files fit in a repository. pwopt rewrites the model. Each system
has a property that should hold, and onnxruntime measures it on the model before and after.

Some terms are used throughout. A *channel* is one entry of the vector at one position (a pixel, a token, a node, a
point in time). A map is *linear* if it consists of a matrix and a bias. ReLU, softmax, and products of two tensors that
both depend on the input are not linear. *Multiply-adds* count the work of convolutions and matrix products. An operator
is *left alone* if a rewrite would change the answer or cost more than it saves.

A figure such as 2.1e-07 is the relative deviation from the property. Single precision rounds at 1e-7, and *exact* means
no deviation. Some properties are quantities that should not change (a loss, a variance, labels). The cells then show
the quantity itself. If it has many values, the cell *before* shows their number. The cell *after* says that they are
the same, or gives the largest difference relative to the largest value.
"""
