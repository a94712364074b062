"""Building blocks that several models share."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "asymmetric_attention": ["CrossAttention", "CrossDomain", "DIRECTIONS", "attention_ref", "attention_weights"],
    "clustering_ema": ["Centres", "assign", "cluster_loss", "dual_scores", "ema_update", "gather_tokens", "group_means", "pack_order", "scatter_tokens",
                       "select_tokens"],
    "distillation": ["SCHEDULES", "adaptive_weights", "calibrate", "calibration_error", "distillation_loss", "kd_loss", "schedule", "similarity_loss",
                     "soften"],
    "experts": ["Experts", "Router", "SpatialExpert", "balance_loss", "expert_flops", "expert_load", "route", "sample_mask", "uncertainty"],
})
