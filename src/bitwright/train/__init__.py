"""Training with quantized forward passes."""
