"""Training, checkpoints, scores on a split, maps."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "training": ["NonFinite", "evaluate", "fit", "history_table", "show_history"],
    "checkpoint": ["Run", "load", "save"],
    "protocol": ["BUDGETS", "Budget", "board_table", "compare", "few_labels", "show_board"],
    "distill": ["Lesson"],  # `distill` is the module; the function is in it
    "map": ["SceneMap", "predict_map", "save_map", "show_map"],
})
