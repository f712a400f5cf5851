"""Quantize and convert: a plan carried out block by block, verified, committed, resumed after a crash.

`quantize.py` is the whole job, `run.py` the loop over the blocks, `quantize_block.py`, `sequential.py`, `quantize_together.py`
and `quantize_matrix.py` its inside.
Imports everything above it.
"""
