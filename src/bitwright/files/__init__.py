"""Safetensors files: checked headers, tensors read one by one, atomic writes; which tensor goes into which file.

Imports: errors, system.
"""
