"""Whole classifiers, made by name."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "base": ["HSIModel"],
    "registry": ["create_model", "list_models"],
})
