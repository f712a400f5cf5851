"""Config attributes in which layers may differ, as Gemma 4's heads do."""

from typing import Any


def of_layer(config: Any, attribute: str, layer: int = 0, default: Any = None) -> Any:
    """A config attribute as a layer has it; the default where the config has none."""
    differing = getattr(config, "per_layer_attributes", None) or ()
    return getattr(config.per_layer_config[layer] if attribute in differing else config, attribute, default)
