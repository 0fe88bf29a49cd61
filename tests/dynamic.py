"""Small models with open inputs, of every kind, and the sizes that they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from helpers import normal, parse

F = np.float32


def w(*shape: int) -> np.ndarray:
    return normal(*shape, dtype=F) * F(0.1)


def said(model: onnx.ModelProto, **metadata: object) -> onnx.ModelProto:
    """The model with entries in its metadata."""
    onnx.helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    )
    return model


def undeclared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs that do not even declare a rank."""
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    return model


def declared_zero(model: onnx.ModelProto, name: str, axis: int) -> onnx.ModelProto:
    value = next(v for v in model.graph.input if v.name == name)
    value.type.tensor_type.shape.dim[axis].dim_value = 0
    return model


@dataclass(frozen=True)
class Case:
    """A model, the sizes that it should be run at, and a word of the reason."""

    build: Callable[[], onnx.ModelProto]
    sizes: dict[str, tuple[int, ...]]
    reason: str
    largest: dict[str, int | None] = field(default_factory=dict)


def image(head: str = "[N,3,H,W]", **weights: np.ndarray) -> onnx.ModelProto:
    return parse(
        f"(float{head} x) => (float[a,b,c,d] y) {{ h = Conv<strides=[4,4]>(x, k) y = Relu(h) }}",
        **{"k": w(8, 3, 4, 4), **weights},
    )


def last(channels: int, declared: str) -> onnx.ModelProto:
    body = f"(float{declared} x) => (float[a,b,c,d] y) {{ t = Transpose<perm=[0,3,1,2]>(x) y = Conv<strides=[4,4]>(t, k) }}"
    return parse(body, k=w(8, channels, 4, 4))


def flattened() -> onnx.ModelProto:
    body = """(float[N,3,H,W] x) => (float[N,10] y) {
        a = Conv<strides=[4,4]>(x, k) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) f = Flatten(p) y = Gemm(f, g)
    }"""
    return parse(body, k=w(8, 3, 4, 4), g=w(8 * 12 * 12, 10))


def patches() -> onnx.ModelProto:
    body = """(float[N,3,H,W] x) => (float[a,b,c] y) {
        p = Conv<strides=[16,16]>(x, k) s = Shape<start=0,end=2>(p) m = Concat<axis=0>(s, minus) f = Reshape(p, m)
        t = Transpose<perm=[0,2,1]>(f) y = Add(t, table)
    }"""
    return parse(body, k=w(8, 3, 16, 16), minus=np.array([-1]), table=w(1, 64, 8))


def encoder(inputs: str = "int64[batch,seq] ids, int64[batch,seq] kinds, int64[batch,seq] mask") -> onnx.ModelProto:
    body = f"""({inputs}) => (float[a,b,c] y) {{
        e = Gather(words, ids) k = Gather(two, kinds) h = Add(e, k) f = Cast<to=1>(mask) u = Unsqueeze(f, axes)
        g = Mul(h, u) y = MatMul(g, q)
    }}"""
    return parse(body, words=w(1000, 32), two=w(2, 32), axes=np.array([-1]), q=w(32, 32))


def cached(past: str) -> onnx.ModelProto:
    body = f"""(float[batch,4,sequence_length,8] k, float[batch,4,{past},8] past_key,
        float[batch,1,1,{past} + sequence_length] mask) => (float[a,b,c,d] y) {{
        all = Concat<axis=2>(past_key, k) t = Transpose<perm=[0,1,3,2]>(all) s = MatMul(k, t) y = Add(s, mask) }}"""
    plain = body.replace(f"{past} + sequence_length", "both")
    model = parse(plain)
    mask = next(v for v in model.graph.input if v.name == "mask")
    mask.type.tensor_type.shape.dim[3].dim_param = f"{past} + sequence_length"
    return model


def empty_cache() -> onnx.ModelProto:
    body = "(float[1,4,t,8] k, float[1,4,p,8] past) => (float[a,b,c,d] y) { y = Concat<axis=2>(past, k) }"
    return declared_zero(parse(body), "past", 2)


def attention() -> onnx.ModelProto:
    """Self-attention over every pixel: 224 × 224 would take 9.4 GiB for each of two maps."""
    body = """(float[N,3,H,W] x) => (float[a,b,c] y) {
        s = Shape<start=0,end=2>(x) m = Concat<axis=0>(s, minus) q = Reshape(x, m) t = Transpose<perm=[0,2,1]>(q)
        a = MatMul(t, q) p = Softmax(a) y = MatMul(p, t)
    }"""
    return parse(body, minus=np.array([-1]))


def waveform(declared: str) -> onnx.ModelProto:
    unsqueeze = "u = Unsqueeze(x, one)" if declared.count(",") == 1 else "u = Identity(x)"
    body = f"(float{declared} x) => (float[a,b,c] y) {{ {unsqueeze} h = Conv<strides=[8]>(u, k) y = Relu(h) }}"
    return parse(body, k=w(16, 1, 16), one=np.array([1]))


RELU = "(float{} x) => (float[a,b] y) {{ y = Relu(x) }}"
CASES: dict[str, Case] = {
    "image, channels first": Case(image, {"x": (1, 3, 224, 224)}, "names"),
    "image, its channels open": Case(lambda: image("[N,C,H,W]"), {"x": (1, 3, 224, 224)}, "the weights of Conv"),
    "image, no names": Case(lambda: image("[?,3,?,?]"), {"x": (1, 3, 224, 224)}, "place"),
    "image, no rank": Case(lambda: undeclared(image()), {"x": (1, 3, 224, 224)}, "4 axes"),
    "image, channels last": Case(lambda: last(3, "[N,H,W,3]"), {"x": (1, 224, 224, 3)}, "names"),
    "image with alpha, channels last": Case(lambda: last(4, "[?,?,?,4]"), {"x": (1, 224, 224, 4)}, "place"),
    "image, channels last and open": Case(lambda: last(4, "[?,?,?,?]"), {"x": (1, 224, 224, 4)}, "the weights of Conv"),
    "Ultralytics": Case(
        lambda: said(image("[batch,3,height,width]"), imgsz=[96, 160], stride=32, batch=2),
        {"x": (2, 3, 96, 160)}, "'imgsz' in the metadata",
    ),
    "Hugging Face, nested": Case(
        lambda: said(image(), config={"vision_config": {"image_size": 384, "patch_size": 16}}),
        {"x": (1, 3, 384, 384)}, "'image_size' in the metadata",
    ),
    "metadata that the graph contradicts": Case(
        lambda: said(flattened(), imgsz="[640, 640]"), {"x": (1, 3, 96, 96)}, "the weights of Gemm",
    ),
    "Gemm behind Flatten": Case(flattened, {"x": (1, 3, 96, 96)}, "the weights of Gemm"),
    "positional table of patches": Case(patches, {"x": (1, 3, 128, 128)}, "the table that Add takes"),
    "height of a table": Case(
        lambda: parse("(float[1,3,H,W] x) => (float[a] y) { y = Add(x, rows) }", rows=w(48, 1)),
        {"x": (1, 3, 48, 320)}, "the table that Add takes",
    ),
    "target of a Reshape": Case(
        lambda: parse("(float[N,T,6] x) => (float[a] y) { y = Reshape(x, t) }", t=np.array([1, 15, 12])),
        {"x": (1, 30, 6)}, "the target of a Reshape",
    ),
    "attention over pixels": Case(attention, {"x": (1, 3, 96, 96)}, "GiB is the most"),
    "waveform of one channel": Case(lambda: waveform("[b,1,t]"), {"x": (1, 1, 16_000)}, "name"),
    "waveform without names": Case(lambda: waveform("[?,?]"), {"x": (1, 16_000)}, "place"),
    "waveform, sample rate": Case(
        lambda: said(waveform("[?,1,?]"), sample_rate=22_050), {"x": (1, 1, 22_050)}, "'sample_rate' in the metadata"
    ),
    "spectrogram": Case(
        lambda: parse("(float[N,80,frames] x) => (float[a] y) { y = Conv(x, k) }", k=w(8, 80, 3)),
        {"x": (1, 80, 400)}, "name",
    ),
    "video": Case(
        lambda: parse("(float[N,3,T,H,W] x) => (float[a] y) { y = Conv<strides=[2,8,8]>(x, k) }", k=w(4, 3, 2, 8, 8)),
        {"x": (1, 3, 16, 112, 112)}, "names",
    ),
    "tokens, a segment and a mask": Case(
        encoder, dict.fromkeys(("ids", "kinds", "mask"), (1, 128)), "name", {"ids": 999, "kinds": 1, "mask": None},
    ),
    "tokens, a longest": Case(
        lambda: said(encoder(), max_position_embeddings=64), dict.fromkeys(("ids", "kinds", "mask"), (1, 64)),
        "'max_position_embeddings' in the metadata",
    ),
    "an index into one": Case(
        lambda: parse("(int64[N] i) => (float[a] y) { c = Cast<to=7>(i) u = Unsqueeze(c, z) y = Gather(t, u) }",
                      z=np.array([1]), t=w(1, 8)),
        {"i": (1,)}, "name", {"i": 0},
    ),
    "key-value cache by name": Case(
        lambda: cached("past_sequence_length"),
        {"k": (1, 4, 128, 8), "past_key": (1, 4, 16, 8), "mask": (1, 1, 1, 144)}, "name",
    ),
    "key-value cache declared empty": Case(
        empty_cache, {"k": (1, 4, 400, 8), "past": (1, 4, 0, 8)}, "declared as 0"
    ),
    "two images": Case(
        lambda: parse("(float[1,3,64,64] a, float[1,3,h,w] b) => (float[n] y) { y = Add(a, b) }"),
        {"a": (1, 3, 64, 64), "b": (1, 3, 64, 64)}, "as 'a' beside it",
    ),
    "time first": Case(
        lambda: parse("(float[seq_len,batch_size,16] x) => (float[a] y, float[b] h) { y, h = GRU<hidden_size=8>(x, k, r) }",
                      k=w(1, 24, 16), r=w(1, 24, 8)),
        {"x": (128, 1, 16)}, "name",
    ),
    "points": Case(
        lambda: parse("(float[batch,num_points,3] x) => (float[a] y) { y = MatMul(x, k) }", k=w(3, 64)),
        {"x": (1, 256, 3)}, "name",
    ),
}  # fmt: skip
