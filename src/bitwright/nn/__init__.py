"""Any torch.nn.Module: layers on integer codes, static and dynamic quantization, weight-only, export to ONNX.

`prepare` marks where values will be codes, `calibrate` watches there, `convert` rewrites the graph. Imports: errors, numerics,
kernels, methods, sparsity, calibration, inference.
"""
