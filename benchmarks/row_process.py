"""One row of a sweep, measured here or in a separate process.

After a CUDA error nothing else can run in the process, so on a GPU every row has its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from options import MissingDataError, SweepOptions

from kvpref.errors import RunError
from kvpref.profiling.compare.comparison import Comparison


def measure_here(module: str, row: str, options: SweepOptions) -> Comparison:
    """Measure a row in this process.

    Args:
        module: Name of the sweep's module.
        row: Name of the row.
        options: Options of the sweep.
    """
    comparison: Comparison = importlib.import_module(module).rows(options)[row]()
    return comparison


def measure_apart(module: str, row: str, options: SweepOptions) -> Comparison:
    """Measure a row in a new process; arguments as for `measure_here`.

    Raises:
        MissingDataError: If the row lacks data.
        RunError: For anything else that goes wrong, including the death of the process.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, module, row, options).result()
        except BrokenProcessPool as error:
            raise RunError("its process died; what it printed last says why") from error


def _measure(module: str, row: str, options: SweepOptions) -> Comparison:
    try:
        return measure_here(module, row, options)
    except MissingDataError:
        raise
    except Exception as error:  # a CUDA error may not survive pickling
        first_line = (str(error).splitlines() or [""])[0]
        raise RunError(f"{type(error).__name__}: {first_line}") from None
