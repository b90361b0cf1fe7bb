"""Co-design of a transformer's dynamic sparsity, its precision and its accelerator.

Public names are re-exported lazily (PEP 562), so importing this package, or a NumPy-only
module of `codesign.hw`, does not import JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {
    "AppliedPolicy": "codesign.applied",
    "Calibration": "codesign.calibration",
    "CodesignError": "codesign.errors",
    "Hooks": "codesign.mechanisms.protocol",
    "LayerCounts": "codesign.layer_counts",
    "LayerPolicy": "codesign.applied",
    "LossAux": "codesign.optimize",
    "Mechanism": "codesign.mechanisms.protocol",
    "OptimizeSettings": "codesign.optimize",
    "Policy": "codesign.policy",
    "Relaxation": "codesign.gates",
    "Workload": "codesign.workload",
    "at_site": "codesign.layers",
    "attention": "codesign.layers",
    "collect": "codesign.layer_counts",
    "fit": "codesign.fitting",
    "init_state": "codesign.optimize",
    "linear": "codesign.layers",
    "make_train_step": "codesign.optimize",
    "mechanism_by_name": "codesign.mechanisms",
    "policy_for": "codesign.applied",
    "relaxation_at": "codesign.optimize",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Imports a re-exported name at its first use.

    Args:
      name: Attribute asked of the package.

    Returns:
      The object that `_EXPORTS` names.

    Raises:
      AttributeError: If the package exports no such name.
    """
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the module's names, those not imported yet included."""
    return sorted({*globals(), *_EXPORTS})
