"""State-space recurrences and the ways to compute them."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "recurrence": ["causal_conv", "lti_kernel", "lti_scan", "lti_scan_ref"],
})
