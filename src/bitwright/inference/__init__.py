"""Run a quantized checkpoint: load it onto packed weights, generate, measure speed.

Imports: numerics, kernels, files, gguf, formats, models.
"""
