"""Regions: connected operators that a pass rewrites together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pwopt.algebra.unions import Unions
from pwopt.graph.ir import Node, Tensor


@dataclass(frozen=True)
class Region:
    """Connected operators, and the tensors that connect them.

    Attributes
    ----------
    nodes : tuple of Node
        In the order of the graph, so that they can run in it.
    tensors : tuple of Tensor
        In the order in which the nodes name them.
    """

    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]


def find_regions(members: Mapping[Node, Iterable[Tensor]]) -> list[Region]:
    """Find the connected components of operators that share tensors.

    Parameters
    ----------
    members : mapping of Node to tensors
        The operators that may belong to a region, in the order of the graph, each with the tensors through which it is
        connected to others.

    Returns
    -------
    list of Region
        In the order of their first operators. Every operator is in exactly one of them.
    """
    tensors = {node: tuple(dict.fromkeys(listed)) for node, listed in members.items()}
    sets = Unions[Node | Tensor]()
    for node, listed in tensors.items():
        for tensor in listed:
            sets.join(node, tensor)
    found: dict[Node | Tensor, list[Node]] = {}
    for node in tensors:
        found.setdefault(sets.root(node), []).append(node)
    return [
        Region(tuple(nodes), tuple(dict.fromkeys(t for node in nodes for t in tensors[node])))
        for nodes in found.values()
    ]
