"""Read nodes as linear maps, write maps as nodes, move scales and shifts past operators, and estimate costs.

`forms` is where to begin: it says what a node is as a map. The modules imported here register the operators it knows.
"""

from pwopt.maps import averages, borders, scales, selections, weights

__all__ = ["averages", "borders", "scales", "selections", "weights"]
