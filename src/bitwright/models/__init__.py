"""Language models of transformers: skeletons without weights, their blocks and names; a directory or GGUF file as a source of
float weights; a model streamed through memory block by block.

The only package that knows transformers' classes. Imports what is above it: numerics, files, gguf, formats.
"""
