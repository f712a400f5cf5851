"""Calibration: text -> token windows -> activations of a block -> statistics of inputs: Gram matrix, ranges, histogram.

Statistics belong to an input, not to a layer: q, k and v share one. Imports: numerics, methods, files, models.
"""
