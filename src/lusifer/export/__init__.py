"""Models for places where neither torch nor this package is.

`onnx` writes a whole model as one ONNX graph, from token ids to unit vectors; `static` writes a table of one vector per
token, whose mean is a text's embedding.
"""
