"""transformers' models: a model without weights (`Skeleton`) whose decoder blocks are loaded and run one at a time; checkpoint
directories and GGUF files as sources of its weights, dequantized where they are quantized.

The package that knows the internals of transformers' model classes. Imports: errors, numerics, files, gguf, formats.
"""
