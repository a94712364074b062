"""Building blocks that several models share."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "asymmetric_attention": ["CrossAttention", "CrossDomain", "DIRECTIONS", "attention_ref", "attention_weights"],
})
