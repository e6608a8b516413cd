"""What `kvpref doctor` finds; each backend first runs alone, because one that kills the process would hide the rest."""

from __future__ import annotations

from functools import partial

from options import SweepOptions

from gpu_run.rows import Figure, Finding, Rows, judged, measured, skipped
from kvpref.ops.attention.backends import backend_names
from kvpref.profiling.backend_probe import BackendProbe, probe_backends
from kvpref.profiling.environment import inspect_environment


def rows(options: SweepOptions) -> Rows:
    """One row per backend, then one for the machine."""
    backends = {f"backend {name}": partial(_backend, name) for name in backend_names()}
    return {**backends, "machine": _machine}


def _machine() -> Finding:
    found = inspect_environment()
    devices = [" ".join(filter(None, (device.name, device.compute_capability))) for device in found.devices]
    packages = [f"{name} {version}" for name, version in found.packages.items() if version is not None]
    automatic = [
        f"auto takes {choice.takes} for {', '.join(choice.dtypes)} on {choice.device}" for choice in found.automatic
    ]
    told = "; ".join([*devices, f"python {found.python}", *packages, *automatic, *found.warnings])
    memory = next((device.memory_bytes for device in found.devices if device.memory_bytes), 0)
    return measured({"memory": Figure(memory / 2**30, "GiB"), "processors": Figure(found.num_cpus, "")}, reason=told)


def _backend(name: str) -> Finding:
    (probe,) = probe_backends([name])
    figures = {f"error in {dtype} on {probe.device}": Figure(error, "") for dtype, error in probe.errors.items()}
    if not probe.works and not figures and not _ran(probe):
        return skipped(probe.reason or "")
    return judged(met=probe.works, bar="right in every dtype that it takes", figures=figures, reason=probe.reason)


def _ran(probe: BackendProbe) -> bool:
    """Whether the reason is a wrong result, not why the backend was not tried."""
    return (probe.reason or "").startswith(("it failed in", "it is wrong in"))
