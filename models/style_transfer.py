"""Style transfer: the style of an image is how its features vary together.

Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016), describe a style by the
Gram matrix G = F·Fᵀ of a layer's features, summed over all pixels. A pointwise layer here is a palette: it mixes
colours, or feature channels, in the same way at every pixel. The model, as torch writes it, has both kinds. It rotates
colours in an opponent space by three consecutive orthogonal 3×3 maps: into the space, a rotation, and back. It also
applies a palette W to the features of the first layers of a VGG-like network, before their Gram matrix.

Rewritten: the three colour maps become one 3→3 map, which is orthogonal like each of them. The palette moves behind the
Gram matrix: (Wx)(Wx)ᵀ = W(xxᵀ)Wᵀ. So it multiplies two 64×64 matrices instead of 4,096 pixels. An orthogonal W never
cancels its input, so rounding errors stay small. If weights nearly cancel their input, pwopt refuses this rewrite.

Left alone: the features are themselves an output and come from a ReLU, so the palette does not fold into the
convolution before it.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import Exporter, orthogonal
from models.system import Law, Refusal, System, normal, outputs
from pwopt.invariants import function_of, isometry
from pwopt.running.session import Session

SIZE, WIDTH = 64, 64
#: Luminance, red-green and blue-yellow, orthonormal (after Ruderman, Cronin and Chiao, "Statistics of cone responses to
#: natural images", 1998).
OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])


def palette() -> np.ndarray:
    """The orthogonal palette of the features: (64, 64)."""
    return orthogonal(np.random.default_rng(18), WIDTH, WIDTH)


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 64, 64) float32 → recoloured, content (batch, 64, 64, 64), style (batch, 64, 64)."""
    e = Exporter(17)
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]]
    x = e.conv("image", "colour/opponent", 3, 3, bias=False, weight=OPPONENT)
    x = e.conv(x, "colour/turn", 3, 3, bias=False, weight=turn)
    x = e.conv(x, "colour/back", 3, 3, bias=False, weight=OPPONENT.T, output="recoloured")
    x = e.node("Relu", [e.conv(x, "features/0", 3, WIDTH, 3, gain=2)], "features/1")
    x = e.node("Relu", [e.conv(x, "features/2", WIDTH, WIDTH, 3, gain=2)], "features/3", "content")
    x = e.conv(x, "palette", WIDTH, WIDTH, bias=False, weight=palette())
    flat = e.node("Reshape", [x, e.constant("gram.shape", [0, WIDTH, -1])], "gram")
    x = e.node("MatMul", [flat, e.node("Transpose", [flat], "gram", perm=[0, 2, 1])], "gram")
    e.node("Div", [x, e.constant("gram.size", float(WIDTH * SIZE * SIZE))], "gram", "style")
    space = [SIZE, SIZE]
    return e.model(
        "style_transfer",
        {"image": ["batch", 3, *space]},
        {
            "recoloured": ["batch", 3, *space],
            "content": ["batch", WIDTH, *space],
            "style": ["batch", WIDTH, WIDTH],
        },
    )


def style_law(session: Session) -> float:
    """‖style − W·Gram(content)·Wᵀ‖ / ‖style‖, the right side in float64."""
    found = outputs(session, image=normal(1, 3, SIZE, SIZE))
    content = found["content"].reshape(WIDTH, -1).astype(np.float64)
    exact = palette() @ (content @ content.T / content.size) @ palette().T
    return float(np.linalg.norm(found["style"][0] - exact) / np.linalg.norm(exact))


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "fold-chains", "commute-gram"),
    properties=(
        Law(
            "the orthogonal palette preserves the length of every colour",
            lambda s: isometry(function_of(s, output="recoloured"), normal(1, 3, SIZE, SIZE)),
            1e-6,
        ),
        Law("style = W·Gram(content)·Wᵀ", style_law, 1e-5),
    ),
    refusals=(Refusal("/features/3/Relu", "the features are an output, and their ReLU is not linear"),),
)
