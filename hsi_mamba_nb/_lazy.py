"""Re-exports that load their module when first used, so that `import hsi_mamba_nb` costs nothing."""
from importlib import import_module


def lazy(
    package: str,  # the package's __name__
    names: dict,  # module -> names it gives
):
    "The `__getattr__`, `__dir__` and `__all__` of a package that re-exports `names`."
    home = {name: module for module, group in names.items() for name in group}

    def __getattr__(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return __getattr__, lambda: sorted(home), sorted(home)
