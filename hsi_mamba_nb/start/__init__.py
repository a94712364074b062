"""Symbols, colours and tests that every chapter uses."""
from hsi_mamba_nb._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "notation": ["PALETTE", "PART_COLOURS", "class_colours", "false_colour", "show_image", "show_labels", "show_spectra", "style"],
    "testing": ["attempt", "check_batch_independent", "check_causal", "check_gradient", "check_linear", "check_round_trip", "compare",
                "expect_fail", "same_with_gradients"],
})
