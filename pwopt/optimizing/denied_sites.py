"""Check the sites that a user denies before any work is done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import onnx

from pwopt.errors import UsageError
from pwopt.rewriting.records import Site

#: The greatest number of names suggested instead of an unknown one.
MAX_SUGGESTIONS = 3


def check_sites(sites: Iterable[Site], proto: onnx.ModelProto, passes: Sequence[str], *, renamed: bool) -> None:
    """Refuse sites that no pass can have.

    Parameters
    ----------
    sites : iterable of Site
        The tensor is an output of a node, or a name that a pass derives from another tensor's by a suffix.
    proto : onnx.ModelProto
    passes : sequence of str
        Names of all passes.
    renamed : bool
        Whether tensors may get other names before the first pass runs.

    Raises
    ------
    UsageError
        With the nearest names.
    """
    tensors = dict.fromkeys(name for node in proto.graph.node for name in (*node.output, node.name) if name)
    named = (*tensors, *(t.name for t in (*proto.graph.input, *proto.graph.initializer)))
    derived = tuple(f"{name}_" for name in named)
    for site in sites:
        name, tensor = site.pass_name, site.tensor
        if name in passes and (renamed or tensor in tensors or tensor.startswith(derived)):
            continue
        wrong = f"no operator makes {tensor!r}" if name in passes else f"there is no pass {name!r}"
        likely = [name] if name in passes else difflib.get_close_matches(name, passes, 1)
        near = [tensor] if tensor in tensors else difflib.get_close_matches(tensor, tensors, MAX_SUGGESTIONS, 0.5)
        found = [repr(f"{p}:{t}") for p in likely for t in near]
        hint = f"did you mean {' or '.join(found)}?" if found else "--details lists the sites of a model"
        raise UsageError(f"there is no place {str(site)!r} to leave alone: {wrong}; {hint}")
