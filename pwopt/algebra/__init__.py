"""Maps that are linear across channels, and how they combine: float64 numpy, no ONNX.

`geometry` has maps without numbers and every exactness rule. `linear` adds the numbers. `multirate` has maps between
sampling rates. `ranks` factors maps of low rank. `overflow` and `zeros` have what floating-point numbers add.
`summaries` asks about all numbers of an array.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Numbers of the algebra.
Array = NDArray[np.float64]
#: Numbers of any type, as models hold them.
Values = NDArray[Any]
