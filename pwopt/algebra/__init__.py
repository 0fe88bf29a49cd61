"""Maps that are linear across channels, and how they combine: float64 numpy, no ONNX.

`geometry` holds what a map looks like and every exactness rule, `linear` adds the numbers, `ranks` finds low ones.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
