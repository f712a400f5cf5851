"""The process and its machine: memory, threads, progress. Knows no tensors of a model.

Imports: errors.
"""
