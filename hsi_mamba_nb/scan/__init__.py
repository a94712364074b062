"""State-space recurrences and the ways to compute them."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "recurrence": ["causal_conv", "lti_kernel", "lti_scan", "lti_scan_ref"],
    "backends": ["available_backends", "selective_scan", "why_not_triton"],
    "cpu_kernel": ["selective_scan_numba"],
    "gpu_scan": ["plan_programs", "selective_scan_triton"],
    "mamba_block": ["BiMamba", "Mamba", "init_weights", "mamba_ref", "short_conv"],
    "parallel_scan": ["combine", "scan_backward", "scan_blelloch", "scan_chunked", "scan_hillis_steele", "scan_ref", "selective_scan_torch"],
    "scan_order": ["BandOrder", "ScanOrder", "check_returns_home", "list_orders", "named_order", "neighbour_gap"],
    "selection": ["check_scan_inputs", "gate_of_step", "inverse_softplus", "scan_matrix", "selective_scan_ref", "softplus", "step_bias"],
})
