"""Models by name. A model's module is imported when the model is made."""
import difflib
from importlib import import_module
from inspect import signature

from hsi_mamba_nb.errors import InputError

__all__ = ["create_model", "list_models"]

_MODELS = {
    "nearest-coords": "hsi_mamba_nb.models.baselines:NearestCoords",
    "nearest-spectrum": "hsi_mamba_nb.models.baselines:NearestSpectrum",
    "logistic": "hsi_mamba_nb.models.baselines:Logistic",
    "svm": "hsi_mamba_nb.models.baselines:SVM",
    "random-forest": "hsi_mamba_nb.models.baselines:RandomForest",
    "cnn-1d": "hsi_mamba_nb.models.baselines:CNN1d",
    "spectral-transformer": "hsi_mamba_nb.models.baselines:SpectralTransformer",
    "cnn-2d": "hsi_mamba_nb.models.baselines:CNN2d",
    "hybridsn": "hsi_mamba_nb.models.baselines:HybridSN",
    "ssa-mamba": "hsi_mamba_nb.models.ssa_mamba:SSAMamba",
    "mamba-hsi": "hsi_mamba_nb.models.mamba_hsi:MambaHSI",
    "css-mamba": "hsi_mamba_nb.models.css_mamba:CSSMamba",
    "mamba-moe": "hsi_mamba_nb.models.mamba_moe:MambaMoE",
    "blm": "hsi_mamba_nb.models.blm_kd:BLM",
}


def list_models() -> list[str]:
    "Names that `create_model` knows."
    return list(_MODELS)


def create_model(
    name: str,  # one of `list_models()`
    bands: int,  # input channels
    classes: int,  # output classes
    **config,  # the model's own options; what is not given keeps its default
):
    "A new model with random weights; its full configuration is kept as `model.config`."
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, 1)
        raise InputError(f"no model {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(_MODELS)}"))
    module, cls = _MODELS[name].split(":")
    cls = getattr(import_module(module), cls)
    options = {k: p.default for k, p in signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = set(config) - set(options)
    if unknown:
        raise InputError(f"{name} has no option {', '.join(sorted(unknown))}; its options are {', '.join(options)}")
    config = {**options, **config}
    model = cls(bands, classes, **config)
    model.name, model.config, model.bands, model.classes = name, config, bands, classes
    return model
