"""Training of quantized models: quantization-aware training (QAT), knowledge distillation, LoRA on packed weights (QLoRA),
weights that are stored in 8 bits while they are trained.

Imports: errors, system, numerics, files, formats, models, calibration, inference, evaluation, nn.
"""

from bitwright.train.storage import decode_from_8_bits, store_in_8_bits

__all__ = ["decode_from_8_bits", "store_in_8_bits"]
