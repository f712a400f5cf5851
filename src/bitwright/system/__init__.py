"""The process and its machine: memory, threads, devices, progress, the native extension. Knows no tensors of a model.

Imports: errors.
"""
