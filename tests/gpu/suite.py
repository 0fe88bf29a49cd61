"""Models for the checks on a graphics card: built here, found in a folder, or shipped inside wheels of other projects."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import numpy as np
import onnx
from builder import Builder
from onnx import TensorProto, helper, numpy_helper

#: Trained models inside wheels (rapidocr-onnxruntime, nudenet): a part of the file's name, ours, its input, sizes.
SHIPPED = {
    "PP-OCRv4_det": ("ppocr_det", "x", (3, 640, 640)),
    "PP-OCRv4_rec": ("ppocr_rec", "x", (3, 48, 320)),
    "cls_infer": ("ppocr_cls", "x", (3, 48, 192)),
    "320n": ("yolov8n", "images", (3, 320, 320)),
}


class Networks(Builder):
    """`Builder` with what these architectures need besides."""

    def batch_norm(self, x: str, channels: int) -> str:
        scale, shift, mean = (self.constant(self.rng.normal(m, 0.1, channels)) for m in (0.5, 0, 0))
        return self.op("BatchNormalization", x, scale, shift, mean, self.constant(self.rng.uniform(0.5, 1.5, channels)))

    def mobileone(self, width: int = 64, blocks: int = 8) -> str:
        """Unfused branches (Vasu et al., "MobileOne", CVPR 2023)."""
        x = self.op("Relu", self.conv("x", 3, width, 3, stride=2))
        for _ in range(blocks):
            for groups, kernel in ((width, 3), (1, 1)):
                parts = [self.batch_norm(self.conv(x, width, width, kernel, groups), width) for _ in range(2)]
                parts += [self.batch_norm(self.conv(x, width, width, 1, groups), width), self.batch_norm(x, width)]
                total = parts[0]
                for part in parts[1:]:
                    total = self.op("Add", total, part)
                x = self.op("Relu", total)
        return x

    def resnet50_v1(self, stages: tuple[int, ...] = (3, 4, 6, 3)) -> str:
        """Strides on the first 1×1 (He et al., 2016, as Caffe and Keras have it)."""
        x = self.op("Relu", self.conv("x", 3, 64, 7, stride=2))
        x = self.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
        inn = 64
        for i, count in enumerate(stages):
            inner, out = 64 << i, 256 << i
            for j in range(count):
                stride = 2 if i and not j else 1
                y = self.op("Relu", self.conv(x, inn, inner, stride=stride))
                y = self.conv(self.op("Relu", self.conv(y, inner, inner, 3)), inner, out)
                x = self.op("Relu", self.op("Add", y, self.conv(x, inn, out, stride=stride) if not j else x))
                inn = out
        return self.conv(self.op("GlobalAveragePool", x), inn, 1000)

    def lora_encoder(self, layers: int = 4, width: int = 256, rank: int = 8) -> str:
        """A transformer's encoder with adapters that were not merged (Hu et al., "LoRA", 2021)."""

        def dense(x: str, inn: int, out: int) -> str:
            weights = (self.constant(self.rng.normal(0, inn**-0.5, s)) for s in ((inn, out), (inn, rank), (rank, out)))
            w, a, b = weights
            adapter = self.op("Mul", self.op("MatMul", self.op("MatMul", x, a), b), self.constant(np.array(2.0)))
            return self.op("Add", self.op("Add", self.op("MatMul", x, w), adapter), self.constant(np.zeros(out)))

        x = "x"
        for _ in range(layers):
            q, k, v = (dense(x, width, width) for _ in range(3))
            scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 1]))
            scaled = self.op("Mul", scores, self.constant(np.array(width**-0.5)))
            mixed = self.op("MatMul", self.op("Softmax", scaled, axis=-1), v)
            x = self.op("Add", x, dense(mixed, width, width))
            x = self.op("Add", x, dense(self.op("Relu", dense(x, width, 2 * width)), 2 * width, width))
        return x

    def generator(self, widths: tuple[int, ...] = (256, 128, 64, 32)) -> str:
        """Nearest upsampling and 3×3 convolutions, as decoders and generators have."""
        x, empty = "x", self.constant(np.zeros(0))
        scales = self.constant(np.array([1, 1, 2, 2]))
        for inn, out in itertools.pairwise(widths):
            up = self.op("Resize", x, empty, scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                         nearest_mode="floor")  # fmt: skip
            x = self.op("Relu", self.batch_norm(self.conv(up, inn, out, 3), out))
        return self.op("Tanh", self.conv(x, widths[-1], 3, 3))


#: Built models: how, and the sizes of their input without the batch.
BUILT = {
    "mobileone": (Networks.mobileone, (3, 112, 112)),
    "resnet50_v1": (Networks.resnet50_v1, (3, 224, 224)),
    "lora_encoder": (Networks.lora_encoder, (196, 256)),
    "generator": (Networks.generator, (256, 16, 16)),
}


def collected(folder: Path, models: Path | None, wheels: Path | None) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Name → file, input and sizes without the batch; built ones and those of wheels are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                match = next((v for k, v in SHIPPED.items() if k in entry and entry.endswith(".onnx")), None)
                if match is not None:
                    path = folder / f"{match[0]}.onnx"
                    path.write_bytes(archive.read(entry))
                    found[match[0]] = path, match[1], match[2]
    for path in sorted(models.glob("**/*.onnx")) if models is not None else ():
        match = next((v for k, v in SHIPPED.items() if k in path.name), None)
        if match is not None:
            found[match[0]] = path, match[1], match[2]
    for name, (build, size) in BUILT.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            b = Networks()
            dynamic = ["N", size[0], "H", "W"] if len(size) == 3 else ["N", *size]
            b.save(path, {"x": dynamic}, [build(b)])
        found[name] = path, "x", size
    return found


def half(path: Path, out: Path) -> Path:
    """A float32 model in float16, input and output too; what Resize is told stays as it is."""
    model = onnx.load(path)
    told = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and tensor.name not in told:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


def uneven_half(path: Path) -> Path:
    """Two float16 convolutions with 20 channels between them, no multiple of 8."""
    b = Networks()
    b.save(path, {"x": [1, 16, 16, 16]}, [b.conv(b.op("Relu", b.conv("x", 16, 20, 3)), 20, 32, 3)])
    return half(path, path)


def small(nodes: list[onnx.NodeProto], path: Path, outputs: dict[str, int]) -> Path:
    """A model of a few nodes on an input x of 1×4 numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "small", [x], y)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
