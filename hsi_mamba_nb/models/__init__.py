"""Whole classifiers, made by name."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "base": ["HSIModel"],
    "baselines": ["CNN1d", "CNN2d", "ClassicalModel", "HybridSN", "Logistic", "NearestCoords", "NearestSpectrum", "RandomForest", "SVM", "SpectralTransformer"],
    "blm_kd": ["AffineCore", "BLM", "ByteInput", "LatentEncoder", "SelectiveCore", "affine_scan", "affine_scan_ref", "bounded", "from_bytes", "state_bound", "to_bytes"],
    "css_mamba": ["CSSMamba", "ClusterBlock", "ClusterScan", "DualAttention", "GlobalScan", "PerClusterLocal", "SharedLocal", "local_scan", "local_scan_ref"],
    "mamba_hsi": ["BothMamba", "MambaHSI", "SpaMamba", "SpeMamba"],
    "mamba_moe": ["BandScan", "ChannelScan", "FeatureFusion", "MambaMoE", "MixtureBlock", "Pyramid", "ResidualUnit", "corrective_loss", "enlarge", "guided_labels",
                  "halve"],
    "registry": ["create_model", "list_models"],
    "ssa_mamba": ["SSAMamba", "ssa_mamba_ref"],
})
