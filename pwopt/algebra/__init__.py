"""Maps that are linear across channels, and how they combine: float64 numpy, no ONNX.

`geometry` holds what a map looks like and every exactness rule, `linear` adds the numbers, `ranks` finds low ones.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What the algebra reckons with.
Array = NDArray[np.float64]
#: Numbers of any type, as models hold them.
Values = NDArray[Any]
