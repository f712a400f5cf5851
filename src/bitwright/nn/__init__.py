"""Quantization of any torch.nn.Module: post-training static and dynamic, weight-only, pruning, export to ONNX.

Static quantization: `prepare` inserts observers (`Edge`) where activations will be integers, `calibrate` records their ranges,
`convert` rewrites the graph into integer layers. Imports: errors, numerics, kernels, methods, sparsity, calibration.
"""
