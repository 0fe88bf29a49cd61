"""Reasons keep names in the model apart."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from pwopt.graph.reasons import Reason, generalize


@given(st.text(), st.text())
def test_a_reason_reads_as_its_template_and_elides_names_only(name: str, operator: str) -> None:
    shared = Reason("the weight {!r} is shared", name)
    outer = Reason("{} of {:,} stays: {}", operator, 1000, shared)
    assert shared == f"the weight {name!r} is shared"
    assert outer == f"{operator} of 1,000 stays: {shared}"
    assert generalize(outer) == outer.general == f"{operator} of 1,000 stays: the weight … is shared"


@given(st.text())
def test_quotes_in_other_text_are_no_names(text: str) -> None:
    assert generalize(text) == text
    assert Reason("{}", text).general == text


def test_lists_of_names() -> None:
    listed = Reason.list_names(["a", "b'{}"])
    assert listed == """'a', "b'{}\""""
    assert Reason("it reads {}", listed).general == "it reads …, …"


def test_reasons_survive_pickling() -> None:
    reason = Reason("{!r} is a graph output", "{y}")
    copy = pickle.loads(pickle.dumps(reason))
    assert (copy, copy.general) == (reason, "… is a graph output")
