"""What a hyperspectral image is: reading, synthesis, splits, patches, scores."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "scene": ["Scene", "compact_labels", "missing_pixels", "spread_ratio"],
    "formats": ["Contents", "band_faults", "read_file", "read_labels", "read_scene"],
    "registry": ["fetch_scene", "list_scenes", "load_scene"],
    "synthetic": ["SceneModel", "bayes_accuracy", "bayes_classify", "draw_scene", "synthetic_scene"],
    "split": ["Split", "coords_only_accuracy", "counts", "counts_table", "label_agreement", "label_range", "ladder_table", "leakage_report", "load_split",
              "merge_masks", "same_classes", "save_split", "show_ladder", "show_leakage", "show_split", "split_blocks", "split_halves", "split_ladder",
              "split_per_class", "split_published", "split_random"],
    "patch": ["PatchDataset", "Standardizer"],
    "scores": ["Scores", "average_accuracy", "confusion_matrix", "kappa", "overall_accuracy", "per_class_accuracy", "show_confusion", "users_accuracy"],
})
