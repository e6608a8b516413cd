"""Optional packages: imported when a backend first needs them, with a reason if that fails."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """One optional dependency of a backend.

    Attributes:
        module: Module that holds the kernels' Python functions.
        distribution: Name of the installed package, whose version is compared.
        minimum_version: Oldest version whose functions have the signatures that the backend calls; None for any.
        install: How to install it.
    """

    module: str
    distribution: str
    minimum_version: str | None = None
    install: str

    def missing_reason(self) -> str | None:
        """Why the package cannot be used and what to install; None if it can. The first call imports it."""
        found = _installed_version(self.distribution)
        if found is not None and self.minimum_version and _release(found) < _release(self.minimum_version):
            return f"it needs {self.distribution} {self.minimum_version} or later, got {found}; {self.install}"
        loaded = _load(self.module)
        if isinstance(loaded, ModuleType):
            return None
        if isinstance(loaded, ModuleNotFoundError) and f"{self.module}.".startswith(f"{loaded.name}."):
            return f"{self.distribution} is not installed; {self.install}"
        message = (str(loaded).splitlines() or [""])[0]
        return f"importing {self.module} failed ({type(loaded).__name__}: {message}); reinstall it: {self.install}"

    def name_and_version(self) -> str:
        """For example ``flash-attn 2.8.3``; only the name if the package has no version."""
        return " ".join(filter(None, (self.distribution, _installed_version(self.distribution))))

    def load(self) -> ModuleType:
        """The imported module.

        Raises:
            ImportError: If there is a `missing_reason`.
        """
        loaded = _load(self.module)
        if not isinstance(loaded, ModuleType):
            raise ImportError(self.missing_reason()) from loaded
        return loaded


@cache
def _load(module: str) -> ModuleType | Exception:
    # A package built for another torch fails in its own way (undefined symbols, assertions, missing attributes);
    # whatever it raises must not keep the other backends from running.
    try:
        return importlib.import_module(module)
    except Exception as error:
        return error


@cache
def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """``2.8.3.post1`` -> (2, 8, 3)."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
