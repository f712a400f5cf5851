"""Training of quantized models: quantization-aware training (QAT), knowledge distillation, LoRA on packed weights (QLoRA).

Imports: errors, numerics, models, nn.
"""
