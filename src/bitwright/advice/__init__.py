"""Advice before any work: what this machine holds and how fast it is, what a model needs, which engine runs what.

Imports: errors, numerics, kernels, methods, models, inference.
"""
