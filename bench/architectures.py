"""Published architectures with random weights, and a batch for each: torchvision's families and tiny encoders; and trained
ones of other packages."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench import trained
from bench.trained import Made

IMAGES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
)  # fmt: skip
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "mvit_v1_b", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
SIZES = {"inception_v3": 96, "maxvit_t": 224, "mvit_v1_b": 224, "s3d": 224}  # the least that the model allows
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "googlenet": lambda size: {"init_weights": False},
    "inception_v3": lambda size: {"init_weights": False, "aux_logits": False},  # whose second head trains at 299 pixels
    "vit_b_16": lambda size: {"image_size": size},
}
FRAMES = {"mvit_v1_b": 16, "s3d": 16}

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**WIDTH, "vocab_size": 50, "max_position_embeddings": 40}
PICTURE = {**WIDTH, "image_size": 32, "patch_size": 8}
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {**TEXT, "embedding_size": 16},
    "bert": TEXT,
    "convbert": {**TEXT, "embedding_size": 16},
    "deberta-v2": TEXT,
    "distilbert": {
        "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 40,
    },
    "electra": {**TEXT, "embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 40},
    "mobilebert": {**TEXT, "embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "modernbert": {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": TEXT,
    "roberta": TEXT,
    "roformer": {**TEXT, "embedding_size": 32},
    "squeezebert": {**TEXT, "embedding_size": 32},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
    "xlm-roberta": TEXT,
    "beit": PICTURE,
    "clip_vision_model": PICTURE,
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "vit": PICTURE,
    "wav2vec2": {**WIDTH, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
    "whisper": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60, "num_mel_bins": 16, "max_source_positions": 20,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    },
}  # fmt: skip


def declared() -> torch.library.Library:
    """The operators without which torchvision cannot be imported, declared for as long as the result lives.

    torchvision on PyPI is built for CUDA, and its C extension does not load beside the CPU build of torch. Two of its operators
    get their shape functions whether it loaded or not, and fail to import where they are not known (transformers imports
    torchvision too). No model here calls them, so it is enough to declare them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


DECLARED = declared()


def torchvision_model(family: str, name: str, size: int) -> Made:
    """One of torchvision's, and random images or clips."""
    size = SIZES.get(name, size)
    options: dict[str, Any] = (
        {"weights": None, "weights_backbone": None} if family == ".segmentation" else {"weights": None}
    )
    options |= OPTIONS[name](size) if name in OPTIONS else {}
    shape = (1, 3, FRAMES.get(name, 8), size, size) if family == ".video" else (2, 3, size, size)
    net = getattr(importlib.import_module(f"torchvision.models{family}"), name)(**options).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():  # the last layer of some begins at 0
            nn.init.normal_(parameter, std=0.02)
    return net, torch.randn(shape)


def encoder(name: str) -> Made:
    """A tiny model of transformers, and random tokens, images or sound."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **ENCODERS[name])
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    if name in ("beit", "clip_vision_model", "segformer", "swin", "vit"):
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "wav2vec2":
        return model, {"input_values": torch.randn(2, 4000)}
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": torch.randint(3, 50, (2, 6))}
    batch = {"input_ids": torch.randint(3, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    return model, batch | ({"decoder_input_ids": torch.randint(3, 50, (2, 6))} if name == "t5" else {})


def makers(size: int) -> dict[str, Callable[[], Made]]:
    """Every architecture, by name. torchvision's, and trained ones, are left out where they are not installed."""
    warnings.filterwarnings("ignore", module="torchvision")
    found: dict[str, Callable[[], Made]] = {}
    if importlib.util.find_spec("torchvision"):
        for family, names in (("", IMAGES), (".segmentation", SEGMENTATION), (".video", VIDEO)):
            found |= {name: lambda name=name, family=family: torchvision_model(family, name, size) for name in names}
    return found | {name: lambda name=name: encoder(name) for name in ENCODERS} | trained.makers()
