"""What a hyperspectral image is: reading, synthesis, splits, patches, scores."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "scene": ["Scene", "compact_labels", "read_scene", "spread_ratio"],
    "registry": ["list_scenes", "load_scene"],
    "synthetic": ["SceneModel", "bayes_accuracy", "bayes_classify", "draw_scene", "synthetic_scene"],
    "split": ["Split", "coords_only_accuracy", "counts", "label_agreement", "leakage_report", "load_split", "save_split", "show_split", "split_blocks",
              "split_per_class", "split_random"],
    "patch": ["PatchDataset", "Standardizer"],
    "scores": ["Scores", "average_accuracy", "confusion_matrix", "kappa", "overall_accuracy", "per_class_accuracy", "show_confusion", "users_accuracy"],
})
