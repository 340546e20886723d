"""Pure functions on tensors of shape (..., M, N).

Layer 0: imports torch and nothing of this package; knows no optimizer words.
"""
