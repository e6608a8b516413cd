"""Finds which of transformers' language models kvpref runs exactly, on tiny random models of the whole registry.

    python benchmarks/census.py                         # every entry and variant
    python benchmarks/census.py --models llama gpt_oss  # some
    python benchmarks/census.py --modes two_pass --json out.json
    python benchmarks/census.py --task image            # models that are given images

Prints one JSON line per model, verdict exact, refused (with the reason), wrong (with the errors), error or not built,
and the counts at the end. Each model runs in a process of its own, forked from one that has imported torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODES = ("two_pass", "one_pass", "packed", "bounded", "padded")
_MEMORY_BYTES = 8 * 2**30
_REGISTRIES = {
    "text": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def main() -> None:
    args = _parsed()
    from census_image_settings import IMAGE_FAMILIES
    from census_variants import VARIANTS
    from transformers.models.auto import modeling_auto

    entries = getattr(modeling_auto, _REGISTRIES[args.task])
    variants = VARIANTS if args.task == "text" else [name for name in IMAGE_FAMILIES if ":" in name]
    names = args.models or [*entries, *(name for name in variants if name.partition(":")[0] in entries)]
    if args.variants:
        names += [name for name in VARIANTS if name.partition(":")[0] in names]
    # The server that is forked from imports torch once; Python 3.11 does not hand it this one's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["census_check"])

    def run(name: str) -> dict[str, Any]:
        row = _run(context, name, args)
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(args.workers) as pool:
        rows = list(pool.map(run, names))
    counts = Counter(row["verdict"] for row in rows)
    if args.json:
        args.json.write_text(_document(rows, counts))
    print(", ".join(f"{verdict} {count}" for verdict, count in counts.most_common()), file=sys.stderr)


def _run(context: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(name, args.task, tuple(args.modes), args.unlisted, sending))
    process.start()
    sending.close()
    row: dict[str, Any] = {"model": name, "verdict": "error"}
    try:
        row = receiving.recv() if receiving.poll(args.seconds) else {**row, "reason": f"more than {args.seconds} s"}
    except EOFError:
        process.join()
        row["reason"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _check(name: str, task: str, modes: tuple[str, ...], unlisted: bool, results: Connection) -> None:
    import resource

    import torch
    from census_check import check
    from census_images import check_images
    from transformers.utils import logging

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    look = check_images if task == "image" else check
    results.send(look(name, modes, unlisted=unlisted))


def _document(rows: list[dict[str, Any]], counts: Counter[str]) -> str:
    """All rows, one per line, with only the largest errors instead of every run's."""
    lines = []
    for row in rows:
        runs = row.get("runs", {})
        largest = {
            name: max((run[name] for run in runs.values() if run["is"] == "exact"), default=None)
            for name in ("logp_error", "gradient_error")
        }
        padded = runs.get("padded/none/fp32", {}).get("is")
        row = {**row, "no_gradient": len(row.get("no_gradient", ()))}
        kept = {name: value for name, value in row.items() if name not in ("runs", "where", "seconds")}
        lines.append(json.dumps({**kept, **{k: v for k, v in largest.items() if v is not None}, "padded": padded}))
    head = json.dumps({"versions": _versions(), "counts": dict(counts)})[:-1]
    return head + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="registry entries or variants; all if left out")
    parser.add_argument("--task", choices=tuple(_REGISTRIES), default="text", help="what the models are given")
    parser.add_argument("--variants", action="store_true", help="with --models: their variants too")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--unlisted", action="store_true", help="set the list of refused families aside")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=120, help="time limit per model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and versions here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
