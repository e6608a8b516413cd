"""What `kvpref doctor` finds."""

from __future__ import annotations

from functools import partial

from options import SweepOptions

from gpu_run.rows import Figure, Finding, Rows, judged, measured, skipped
from kvpref.profiling.backend_probe import BackendProbe
from kvpref.profiling.environment import Environment, inspect_environment


def rows(options: SweepOptions) -> Rows:
    """The machine, then every backend."""
    environment = inspect_environment()
    probes = {f"backend {probe.name}": partial(_backend, probe) for probe in environment.backends}
    return {"machine": partial(_machine, environment), **probes}


def _machine(environment: Environment) -> Finding:
    devices = [" ".join(filter(None, (device.name, device.compute_capability))) for device in environment.devices]
    packages = [f"{name} {version}" for name, version in environment.packages.items() if version is not None]
    told = "; ".join([*devices, f"python {environment.python}", *packages, *environment.warnings])
    memory = next((device.memory_bytes for device in environment.devices if device.memory_bytes), 0)
    return measured(
        {"memory": Figure(memory / 2**30, "GiB"), "processors": Figure(environment.num_cpus, "")}, reason=told
    )


def _backend(probe: BackendProbe) -> Finding:
    figures = {f"error in {dtype} on {probe.device}": Figure(error, "") for dtype, error in probe.errors.items()}
    if not probe.works and not figures and not _ran(probe):
        return skipped(probe.reason or "")
    return judged(met=probe.works, bar="right in every dtype that it takes", figures=figures, reason=probe.reason)


def _ran(probe: BackendProbe) -> bool:
    """Whether its reason is about what it computed, not about why it was not tried."""
    return (probe.reason or "").startswith(("it failed in", "it is wrong in"))
