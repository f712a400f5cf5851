"""GGUF, llama.cpp's file format: reader, metadata keys, tokenizers, architectures, quantization mixes, importance matrices.

It neither quantizes nor runs a model. The writer and the block types are in formats/. Imports: errors, numerics, files.
"""
