from __future__ import annotations

from helpers import MODELS, normal, parse

import pwopt


def test_every_map_with_its_size_and_fate() -> None:
    maps = pwopt.inspect(MODELS / "network_in_network.onnx").maps
    assert [m.channels for m in maps] == ["3→96", "96→80", "80→48", "48→64", "64→64", "64→100"]
    assert [m.single_tap for m in maps] == [False, True, True, False, True, True]
    assert maps[0].space == (32, 32)
    assert maps[0].macs == 32 * 32 * 96 * 3 * 25
    assert any("folds into" in d for d in maps[0].decisions)
    assert maps[1].decisions == ()
    assert any("64→64→100 is cheaper as one map" in d for d in maps[4].decisions)


def test_pairs_are_named_with_the_price_of_folding_them() -> None:
    """A MobileNetV2 project → BatchNormalization → expand pair."""
    body = "(double[1,4,8,8] x) => (double[N] y) { a = Conv(x, p) b = BatchNormalization(a, g, o, o, g) c = Conv(b, e) y = Relu(c) }"
    one, zero = normal(2) ** 2 + 1, normal(2)
    model = parse(body, p=normal(2, 4, 1, 1), g=one, o=zero, e=normal(12, 2, 1, 1))
    first, second = pwopt.inspect(model).maps
    assert first.chain == second.chain == 1
    assert second.decisions == ("fold-chains: folding 4→2→12 would cost 1.50× the multiply-adds (2,048 → 3,072)",)


def test_inspection_changes_nothing() -> None:
    model = parse(
        "(double[1,4,8,8] x) => (double[N] y) { a = Conv(x, p) y = Mul(a, s) }", p=normal(2, 4, 1, 1), s=normal(1)
    )
    before = model.SerializeToString(deterministic=True)
    pwopt.inspect(model)
    assert model.SerializeToString(deterministic=True) == before
