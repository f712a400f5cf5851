"""Training with quantized forward passes: quantization-aware training, distillation.

Imports: errors, numerics, models, nn.
"""
