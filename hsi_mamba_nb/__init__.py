"""Selective state-space models for hyperspectral image classification. Import from the parts: scene, scan, models, learn."""
__version__ = "0.1.0"
