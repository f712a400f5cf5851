"""GGUF, the file format of llama.cpp: container, keys, tokenizers, architectures, file types, importance matrices.

Knows neither schemes being fitted nor models being run. Imports: errors, system, numerics, files.
"""
