"""Which optional packages a command needs, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

from mmm_export.errors import MissingPackageError

# Import names, not distribution names. The command line looks here before it begins, so nothing fails half-way.
EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "matplotlib"),
    "demo": ("skimage", "sklearn"),
    "trt": ("onnx", "onnx_ir", "elftools"),
    "distill": ("torch", "ruamel"),
    "tensorboard": ("tensorboard",),
    "bench": ("matplotlib",),
    "plugins": ("elftools",),
}


def require(extra: str) -> None:
    """Raise MissingPackageError unless every package of an extra can be found; imports none of them."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise missing_packages(missing, extra)


def missing_packages(missing: list[str], extra: str | None = None) -> MissingPackageError:
    """Return the error for packages that are not installed, with the command that installs them, by `extra` if it is known."""
    extra = extra or next((name for name, packages in EXTRAS.items() if missing[0] in packages), None)
    wanted = f"mmm-export[{extra}]" if extra else "mmm-export"
    return MissingPackageError(
        f"this command needs {', '.join(missing)}", found="not installed", hint=f'pip install "{wanted}"'
    )
