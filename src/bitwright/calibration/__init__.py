"""From text to statistics: text -> token windows -> activations of a block -> Gram matrices, ranges, histograms.

Statistics belong to an input, not to a layer: q, k and v share one. Imports: numerics, methods, files, models.
"""
