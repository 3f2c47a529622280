"""The compiled extension, if it was built: loading it registers the C++ and CUDA kernels with the ops declared here."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from ._build_record import why_missing, why_unloadable

library = torch.library.Library("longmem", "DEF")

extension: ModuleType | None = None
load_error: str | None = None
# Asked once: torch.compile cannot trace a call into the extension module.
cuda_kernels = False


def load_extension() -> None:
    """Load `longmem_kernels._C` once the op schemas exist. A failure is kept, for `python -m longmem_kernels.info`."""
    global extension, load_error, cuda_kernels
    name = f"{__package__}._C"
    try:
        extension = import_module(name)
    except ModuleNotFoundError:
        load_error = why_missing(name)
    except ImportError as error:
        load_error = why_unloadable(name, error)
    else:
        cuda_kernels = bool(build_info()["cuda"])


def build_info() -> dict[str, str]:
    """Version, compiler, SIMD level and CUDA architectures of the compiled extension; empty without one."""
    return dict(extension.build_info()) if extension is not None else {}
