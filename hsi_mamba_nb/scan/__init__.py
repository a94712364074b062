"""State-space recurrences and the ways to compute them."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "recurrence": ["causal_conv", "lti_kernel", "lti_scan", "lti_scan_ref"],
    "backends": ["available_backends", "selective_scan"],
    "cpu_kernel": ["selective_scan_numba"],
    "parallel_scan": ["combine", "scan_backward", "scan_blelloch", "scan_chunked", "scan_hillis_steele", "scan_ref", "selective_scan_torch"],
    "selection": ["check_scan_inputs", "gate_of_step", "inverse_softplus", "scan_matrix", "selective_scan_ref", "softplus", "step_bias"],
})
