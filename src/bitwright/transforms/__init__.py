"""What changes a model before rounding without changing its function: channel scales folded into norms and matrices,
rotations, the output temperature.

Imports: numerics, methods, models, calibration.
"""
