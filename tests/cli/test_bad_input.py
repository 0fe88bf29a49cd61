"""What is not a sound model, or cannot be read or written: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, get_args, get_type_hints

import numpy as np
import onnx
import pytest
import typer
from helpers import evaluate, normal, parse
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt import cli
from pwopt.graph import storage

pytest.importorskip("onnxruntime")
F = np.float32
Change = Callable[[onnx.ModelProto], object]


def sound() -> onnx.ModelProto:
    body = "(float[1,4,5,5] x) => (float[1,3,5,5] y) { h = Conv(x, w) k = Mul(h, s) y = Relu(k) }"
    return parse(body, w=normal(3, 4, 1, 1, dtype=F), s=F(2))


def branching() -> onnx.ModelProto:
    """y = If(c) with one Neg of the outer x in each branch."""
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "body", [], [output])
    model = parse("(float[2] x, bool c) => (float[2] y) { y = Neg(x) }")
    model.graph.node[0].CopyFrom(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    return model


def external(folder: Path, **place: str | None) -> onnx.ModelProto:
    """A model with its weight in weights.bin; `place` overrides location, offset and length."""
    body = "(float[1,64,2,2] x) => (float[1,64,2,2] y) { h = Conv(x, w) k = Mul(h, s) y = Relu(k) }"
    model = parse(body, w=normal(64, 64, 1, 1, dtype=F), s=F(2))
    tensor = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    return elsewhere(model, tensor, **{"location": "weights.bin", "offset": "0", "length": "16384"} | place)


def elsewhere(model: onnx.ModelProto, tensor: TensorProto, **place: str | None) -> onnx.ModelProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return model


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, codes: tuple[int, ...] = (3,)) -> str:
    """Run the command line; it must end with one of the codes, one sentence, and the folder as it was."""
    before = listing(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    sentence = "".join(line for line in err.splitlines(keepends=True) if not re.match(r" *\d+\.\d s [a-z]", line))
    assert end.value.code in codes, sentence
    assert sentence.startswith("pwopt: ")
    assert sentence.count("\n") == 1
    assert "internal error" not in sentence
    assert out == ""
    assert listing(folder) == before
    return sentence


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def commands(model: Path) -> list[list[object]]:
    return [
        ["optimize", model, "--cost", "analytic"],
        ["optimize", model, "--cost", "analytic", "--no-verify"],
        ["inspect", model],
        ["verify", model, model],
        ["bench", model],
    ]


def truncated(keep: float) -> bytes:
    whole = sound().SerializeToString()
    return whole[: int(keep * len(whole))]


FILES = {
    "empty": b"",
    "zeros": bytes(100),
    "text": b"hello world\n" * 10,
    "a zip's first bytes": b"PK\x03\x04" + bytes(60),
    "another protobuf": helper.make_tensor_value_info("x", 1, [2]).SerializeToString(),
    **{f"random {seed}": np.random.default_rng(seed).bytes(400) for seed in range(5)},
    **{f"the first {keep:.0%}": truncated(keep) for keep in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_not_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    for command in commands(path):
        refused(capsys, tmp_path, *command)


def test_other_things_than_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("m.onnx", sound().SerializeToString())
    assert "is a folder" in refused(capsys, tmp_path, "optimize", tmp_path)
    assert "not a regular file" in refused(capsys, tmp_path, "optimize", tmp_path / "pipe")
    assert "not an ONNX model" in refused(capsys, tmp_path, "optimize", tmp_path / "m.zip")
    assert "no file" in refused(capsys, tmp_path, "optimize", tmp_path / "none", codes=(2,))
    refused(capsys, tmp_path, "optimize", tmp_path / "loop", codes=(2, 3))
    refused(capsys, tmp_path, "optimize", tmp_path / ("long" * 100), codes=(2, 3))


def initializer(index: int, value: np.ndarray) -> Change:
    return lambda m: m.graph.initializer[index].CopyFrom(
        numpy_helper.from_array(value, m.graph.initializer[index].name)
    )


def attributes(**values: object) -> Change:
    return lambda m: m.graph.node[0].attribute.extend(helper.make_attribute(k, v) for k, v in values.items())


def field(message: str, name: str, value: object) -> Change:
    """Set `name` of a message, given as a Python expression in the model `m`."""
    return lambda m: setattr(eval(message, {"m": m}), name, value)


#: Refused by every command, before onnxruntime sees the model.
STRUCTURE: dict[str, tuple[Change, str]] = {
    "opset 0": (field("m.opset_import[0]", "version", 0), "opset 0"),
    "opset -1": (field("m.opset_import[0]", "version", -1), "opset -1"),
    "a future opset": (field("m.opset_import[0]", "version", 999), "upgrade onnx"),
    "no opset": (lambda m: m.ClearField("opset_import"), "no opset"),
    "IR version 0": (field("m", "ir_version", 0), "IR version 0"),
    "IR version -5": (field("m", "ir_version", -5), "IR version -5"),
    "a future IR version": (field("m", "ir_version", 999), "upgrade onnx"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "IR version 0"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "has no outputs"),
    "a cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "depends on its own output"),
    "a loop": (lambda m: m.graph.node[1].input.__setitem__(0, "k"), "depends on its own output"),
    "an undefined input": (lambda m: m.graph.node[1].input.__setitem__(0, "nope"), "nothing defines it"),
    "an undefined output": (field("m.graph.output[0]", "name", "nope"), "nothing defines it"),
    "one tensor twice": (lambda m: m.graph.node[2].output.__setitem__(0, "k"), "defined twice"),
    "an input that is computed": (lambda m: m.graph.node[2].output.__setitem__(0, "x"), "defined twice"),
    "one input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "defined twice"),
    "an unknown type of weight": (field("m.graph.initializer[0]", "data_type", 77), "no valid type"),
    "an unknown type of input": (field("m.graph.input[0].type.tensor_type", "elem_type", 99), "ype"),
    "an input without type": (lambda m: m.graph.input[0].ClearField("type"), "is not a tensor"),
    "a negative size": (lambda m: m.graph.initializer[0].dims.__setitem__(0, -3), ""),
    "a weight of 2⁶² rows": (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**62), ""),
    "a weight without data": (field("m.graph.initializer[0]", "raw_data", b""), ""),
    "a weight with half a number": (field("m.graph.initializer[0]", "raw_data", b"abc"), ""),
    "a node without inputs": (lambda m: m.graph.node[0].ClearField("input"), ""),
    "a node with too few inputs": (lambda m: m.graph.node[0].input.pop(), ""),
    "a weight of rank 0": (initializer(0, F(1)), ""),
    "strides of 0": (attributes(strides=[0, 0]), "strides below 1"),
    "dilations of 0": (attributes(dilations=[0, 0]), "dilations below 1"),
    "strides of text": (attributes(strides="ab"), ""),
    "strides of fractions": (attributes(strides=[1.5, 2.5]), ""),
    "groups of text": (attributes(group="x"), ""),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), STRUCTURE.values(), ids=STRUCTURE)
def test_models_that_are_not_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, words: str
) -> None:
    model, path = sound(), tmp_path / "m.onnx"
    change(model)
    path.write_bytes(model.SerializeToString())
    for command in commands(path):
        assert words in refused(capsys, tmp_path, *command, codes=(2, 3))


#: Refused because onnxruntime does not load them.
REFUSED: dict[str, Change] = {
    "a weight of integers": initializer(0, np.ones((3, 4, 1, 1), np.int64)),
    "a scale of another type": initializer(1, np.float64(2)),
    "a scale of text": initializer(1, np.array(["a"], object)),
    "a weight of rank 2": initializer(0, np.ones((3, 4), F)),
    "an unknown operator": field("m.graph.node[2]", "op_type", "Frob"),
    "an operator without a name": field("m.graph.node[2]", "op_type", ""),
    "two nodes of one name": lambda m: [setattr(n, "name", "same") for n in m.graph.node],
    "an attribute twice": lambda m: [attributes(group=1)(m), attributes(group=2)(m)],
    "a node with too many inputs": lambda m: m.graph.node[2].input.extend(["x"] * 5),
    "an operator of nobody's domain": field("m.graph.node[2]", "domain", "nobody"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_models_that_onnxruntime_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change) -> None:
    model, path = sound(), tmp_path / "m.onnx"
    change(model)
    path.write_bytes(model.SerializeToString())
    for command in (["optimize", path], ["optimize", path, "--cost", "analytic"], ["verify", path, path]):
        assert "onnxruntime" in refused(capsys, tmp_path, *command, codes=(2, 3))


@pytest.mark.parametrize("change", ["undefined", "cycle", "twice", "outer"])
def test_bodies_that_are_not_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    model, path = branching(), tmp_path / "m.onnx"
    body = model.graph.node[0].attribute[0].g
    if change == "twice":
        body.node.append(body.node[0])
    else:
        body.node[0].input[0] = {"undefined": "nope", "cycle": "y", "outer": "b"}[change]
    path.write_bytes(model.SerializeToString())
    refused(capsys, tmp_path, "optimize", path, "--cost", "analytic")


PLACES: dict[str, tuple[dict[str, str | None], str]] = {
    "missing": ({"location": "none.bin"}, "missing"),
    "too short": ({"length": "16388"}, "too short"),
    "far too short": ({"offset": str(2**70)}, "too short"),
    "above the folder": ({"location": "../weights.bin"}, "outside the model's folder"),
    "absolute": ({"location": "/dev/zero"}, "outside the model's folder"),
    "a link out": ({"location": "link.bin"}, "outside the model's folder"),
    "a folder": ({"location": "."}, "missing"),
    "nowhere": ({"location": None}, "missing"),
    "at a negative offset": ({"offset": "-5"}, "no valid place"),
    "of a negative length": ({"length": "-5"}, "no valid place"),
    "at no number": ({"offset": "abc"}, "no valid place"),
    "in a file with a NUL": ({"location": "a\0b"}, "no valid place"),
    "less than the shape says": ({"length": "16"}, ""),
    "not whole numbers": ({"length": None, "offset": "101"}, ""),
}


@pytest.mark.parametrize(("place", "words"), PLACES.values(), ids=PLACES)
def test_external_data_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: dict[str, str | None], words: str
) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(1 << 16))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    path = folder / "m.onnx"
    path.write_bytes(external(folder, **place).SerializeToString())
    for command in commands(path):
        assert words in refused(capsys, folder, *command)


@pytest.mark.parametrize("where", ["attribute", "body", "sparse"])
@pytest.mark.parametrize(("location", "words"), [("../secret", "outside the model's folder"), ("none", "missing")])
def test_external_data_inside_of_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, location: str, words: str
) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    (folder / "weights.bin").write_bytes(F([1, 2]).tobytes())
    if where == "attribute":
        model = parse("(float[2] x) => (float[2] y) { k = Constant<value=float[2]{1.0, 2.0}>() y = Add(x, k) }")
        tensor = model.graph.node[0].attribute[0].t
        tensor.ClearField("float_data")
    elif where == "body":
        model = branching()
        body = model.graph.node[0].attribute[0].g
        tensor = body.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[2])
        body.node[0].CopyFrom(helper.make_node("Add", ["x", "w"], ["b"]))
    else:
        model = sound()
        values, indices = numpy_helper.from_array(F([1, 2]), "s"), numpy_helper.from_array(np.array([0, 1]))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
        tensor = model.graph.sparse_initializer[0].values
    path = folder / "m.onnx"
    elsewhere(model, tensor, location=location)
    path.write_bytes(model.SerializeToString())
    for command in commands(path):
        assert words in refused(capsys, folder, *command)
    tensor.external_data[0].value = "weights.bin"
    path.write_bytes(model.SerializeToString())
    pwopt.save(pwopt.load(path), tmp_path / "moved.onnx")  # the data goes where the model goes
    assert not list(tmp_path.glob("moved.onnx.*"))
    if where == "attribute":
        np.testing.assert_array_equal(evaluate(onnx.load(tmp_path / "moved.onnx"), x=np.zeros(2, F))[0], [1, 2])


def test_tensors_that_share_their_bytes_still_do(tmp_path: Path) -> None:
    """A thousand tensors that point to one place must not become a thousand copies of it."""
    model = external(tmp_path)
    for i in range(1000):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"w{i}"
    model.graph.node.add().CopyFrom(
        helper.make_node("Sum", [t.name for t in model.graph.initializer if t.name.startswith("w")], ["z"])
    )
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    pwopt.save(pwopt.load(tmp_path / "m.onnx"), tmp_path / "new.onnx")
    assert (tmp_path / "new.onnx.data").stat().st_size == 16384


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder, as a user to whom permissions apply."""
    with tempfile.TemporaryDirectory(prefix="pwopt-test-", ignore_cleanup_errors=True) as name:
        folder, me = Path(name), os.geteuid()
        folder.chmod(0o777)
        if me == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if me == 0:
                os.seteuid(me)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o777)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
def test_no_permission(capsys: pytest.CaptureFixture[str]) -> None:
    with as_nobody() as folder:
        path = folder / "m.onnx"
        path.write_bytes(sound().SerializeToString())
        folder.chmod(0o555)
        assert "Permission denied" in refused(capsys, folder, "optimize", path, "--cost", "analytic", codes=(2,))
        folder.chmod(0o777)
        path.chmod(0)
        with pytest.raises(pwopt.ModelError, match="Permission denied"):
            pwopt.optimize(path, cost="analytic")
        hidden = folder / "hidden"
        hidden.mkdir()
        (hidden / "m.onnx").write_bytes(sound().SerializeToString())
        hidden.chmod(0)
        with pytest.raises(pwopt.ModelError, match="Permission denied"):
            pwopt.load(hidden / "m.onnx")


def test_external_data_without_permission() -> None:
    with as_nobody() as folder:
        path = folder / "m.onnx"
        path.write_bytes(external(folder).SerializeToString())
        (folder / "weights.bin").chmod(0)
        for check in (True, False):
            with pytest.raises(pwopt.ModelError):
                pwopt.optimize(path, folder / "new.onnx", cost="analytic", verify=check)
        assert {p.name for p in folder.iterdir()} == {"m.onnx", "weights.bin"}


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize("data", [False, True])
def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bool) -> None:
    path = tmp_path / "m.onnx"
    large = parse("(float[1,64,2,2] x) => (float[1,64,2,2] y) { h = Conv(x, w) k = Mul(h, s) y = Relu(k) }",
                  w=normal(64, 64, 1, 1, dtype=F), s=F(2))  # fmt: skip
    path.write_bytes((external(tmp_path) if data else large).SerializeToString())
    with small_disk(tmp_path, "8k") as disk:
        (disk / "out.onnx").write_bytes(b"earlier")
        for more in ([], ["--no-verify"]):
            command = ["optimize", path, "-o", disk / "out.onnx", "--cost", "analytic", *more]
            assert "No space left on device" in refused(capsys, disk, *command, codes=(2,))
    assert path.exists()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_disk_that_fills_while_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def filling(path: Path, *, lasting: bool = True) -> Iterator[IO[bytes]]:
        with replacing(path, lasting=lasting) as stream:
            stream.write(b"half of ")
            full()
            yield stream

    replacing = storage.replacing
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    path.write_bytes(external(tmp_path).SerializeToString())
    out.write_bytes(b"earlier")
    if moment == "write":
        monkeypatch.setattr(storage, "replacing", filling)
        monkeypatch.setattr("pwopt.graph.files.replacing", filling)
    else:
        monkeypatch.setattr(storage.os, moment, full)
    for more in ([], ["--no-verify"]):
        command = ["optimize", path, "-o", out, "--cost", "analytic", *more]
        assert "No space left on device" in refused(capsys, tmp_path, *command, codes=(2,))


def test_the_output_is_not_the_input_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(sound().SerializeToString())
    (tmp_path / "link.onnx").symlink_to(path)
    os.link(path, tmp_path / "twin.onnx")
    for out in (path, tmp_path / "link.onnx", tmp_path / "twin.onnx", tmp_path / "." / "m.onnx"):
        assert "--force" in refused(capsys, tmp_path, "optimize", path, "-o", out, codes=(2,))
    assert "is a folder" in refused(capsys, tmp_path, "optimize", tmp_path, "-o", path)
    (tmp_path / "folder").mkdir()
    command = ["optimize", path, "-o", tmp_path / "folder", "--cost", "analytic"]
    assert "not a regular file" in refused(capsys, tmp_path, *command, codes=(2,))


#: Optimises argv[1] to argv[2] and dies without notice at the argv[4]-th call of os.<argv[3]>.
DYING = """
import os, signal, sys
import pwopt
source, output, moment, count = sys.argv[1:]
real, calls = getattr(os, moment), iter(range(100))
def die(*arguments):
    if next(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(os, moment, die)
pwopt.optimize(source, output, cost="analytic", verify=False, writing=pwopt.Writing(force=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize(
    ("moment", "count", "same"),
    [("fsync", 0, False), ("replace", 0, False), ("fsync", 1, False), ("replace", 1, False), ("replace", 1, True)],
)
def test_killed_while_it_writes(tmp_path: Path, moment: str, count: int, same: bool) -> None:
    """An fsync and a replace for the data, then for the model; `same`: the input is to be replaced."""
    path = tmp_path / "m.onnx"
    path.write_bytes(external(tmp_path).SerializeToString())
    out = path if same else tmp_path / "out.onnx"
    if not same:
        pwopt.save(pwopt.load(path), out)  # an earlier output
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", DYING, path, out, moment, str(count)], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = listing(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    x = normal(1, 64, 2, 2, dtype=F)
    np.testing.assert_array_equal(evaluate(onnx.load(out), x=x)[0], evaluate(onnx.load(path), x=x)[0])
    expected = evaluate(onnx.load(path), x=x)[0]
    pwopt.optimize(
        path, out, cost="analytic", writing=pwopt.Writing(force=True)
    )  # and what it left behind is in nobody's way
    np.testing.assert_allclose(evaluate(onnx.load(out), x=x)[0], expected, rtol=1e-4, atol=1e-5)


def list_numeric_options() -> list[tuple[str, str]]:
    """Every option that is a number, with its command."""
    found = []
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for function in (cli.optimize, cli.verify, cli.inspect, cli.passes, cli.bench, cli.profile, cli.cache, cli.doctor):
        for parameter in commands[function.__name__].params:
            kind = get_type_hints(function).get(parameter.name)
            if {int, float} & {kind, *get_args(kind)}:
                found.append((function.__name__, parameter.opts[0]))
    assert len(found) == 13
    return found


@pytest.mark.parametrize(("command", "option"), list_numeric_options())
def test_a_number_in_words(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every numeric option says in one sentence what it takes, with an example that it does take."""

    def give(value: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, option, value])
        assert caught.value.code == 2
        return capsys.readouterr().err

    said = give("ten")
    found = re.fullmatch(rf"pwopt: {option} takes .*, such as (\S+); 'ten' is no (whole )?number\n", said)
    assert found is not None, said
    assert f"{option} takes" not in give(found[1])
    if found[2]:
        assert f"'{found[1]}.5' is no whole number" in give(f"{found[1]}.5")


def test_numbers_that_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "m.onnx", "--threads", "0"])
    assert capsys.readouterr().err == "pwopt: --threads takes a whole number, such as 4; '0' is less than 1\n"


def test_a_budget_below_nothing_and_shapes_in_words() -> None:
    model = parse("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    with pytest.raises(pwopt.UsageError, match="nothing can be measured in -1 seconds; give 0 or more"):
        pwopt.optimize(model, measuring=pwopt.Measuring(budget=-1.0))
    with pytest.raises(pwopt.UsageError, match="threads is '1'; give a whole number, or several"):
        pwopt.optimize(model, threads="1")  # type: ignore[arg-type]
    for kind, wrong, message in (
        (pwopt.Request, {"opset": "a"}, "opset is 'a'; give a number"),
        (pwopt.Limits, {"max_growth": "a"}, "max_growth is 'a'; give a number"),
        (pwopt.Limits, {"rtol": -1.0}, "a tolerance is a number from 0 on, and rtol is -1.0"),
        (pwopt.Measuring, {"budget": "1"}, "budget is '1'; give a number"),
        (pwopt.Measuring, {"budget": float("nan")}, "nothing can be measured in nan seconds"),
        (pwopt.Measuring, {"effort": "hard"}, "effort is 'hard', which is not one of: quick, normal, thorough"),
        (pwopt.Request, {"measuring": 3}, "measuring is 3; give pwopt.Measuring"),
    ):
        with pytest.raises(pwopt.UsageError, match=message):
            kind(**wrong)  # type: ignore[operator]
    with pytest.raises(pwopt.UsageError, match="the output 42 is not a path"):
        pwopt.optimize(model, 42)  # type: ignore[arg-type]
    with pytest.raises(pwopt.UsageError, match="the shapes 'x=2x3' are not a mapping"):
        pwopt.optimize(model, shapes="x=2x3")  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_times_that_are_no_times_are_refused(seconds: float) -> None:
    for field in ("budget", "race_seconds"):
        with pytest.raises(pwopt.UsageError, match=r"nothing can be measured in .* give 0 or more"):
            pwopt.Measuring(**{field: seconds})
    with pytest.raises(pwopt.UsageError, match=r"models cannot be raced for .* give 0 or more"):
        pwopt.benchmark(["m.onnx"], seconds=seconds)
