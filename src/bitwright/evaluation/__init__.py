"""Judge and compare: perplexity, KL divergence and top-1 agreement beside the float model; many methods in one table and
page; what a directory holds.

Imports everything above it.
"""
