"""The process that runs rows: reads jobs from its input, one a line, and writes events to its output, one a line.

Everything else that is printed goes to the standard error stream, which the driver keeps as a log.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    # Whatever a library prints must not get between the events, so standard output is theirs alone.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event, **values}) + "\n")

    from gpu_run.job import run_job  # slow: torch, transformers and kvpref, while another worker is at work

    for line in sys.stdin:
        run_job(send, **json.loads(line))
    os._exit(0)  # the teardown of a CUDA context tells nothing, and may hang


if __name__ == "__main__":
    main()
