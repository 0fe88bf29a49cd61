"""Models run here, and nowhere else: the only room that imports onnxruntime. Inputs, sizes, clocks."""
