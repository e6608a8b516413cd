"""Every backend that works here against float64: strided inputs, head dims, groups, odd pairs."""

from __future__ import annotations

from functools import partial

import torch
from options import SweepOptions

from gpu_run.kernel_cases import UNREAD, KernelCase, all_cases, errors_of, gradients
from gpu_run.rows import Figure, Finding, Rows, judged, skipped
from gpu_run.working_backends import fast_backends, refusal


def rows(options: SweepOptions) -> Rows:
    """Those that compile kernels at first use come last."""
    backends = sorted(fast_backends(options), key=lambda name: name == "flash_attn_4")
    cases = list(all_cases(backends, options))
    if options.dry_run:
        cases = cases[:: len(cases) // 4]
    return {case.name: partial(_row, case, options) for case in cases}


def _row(case: KernelCase, options: SweepOptions) -> Finding:
    reason = refusal(case.backend, options, case.head_dim)
    if reason is not None:
        return skipped(reason)
    errors = errors_of(case, options.device)
    worst = max(errors, key=lambda item: item.found / max(item.naive, item.slack))
    *_, prefix_dk, prefix_dv = gradients(case, options.device)
    unread = float(torch.cat([prefix_dk[UNREAD], prefix_dv[UNREAD]]).abs().max())
    wrong = [f"{item.name} {item.found:.1e}, naive {item.naive:.1e}" for item in errors if not item.is_fine]
    if unread != 0:
        wrong.append(f"gradients of keys that nobody reads are {unread:.1e}, not 0")
    return judged(
        met=not wrong,
        bar="at most twice the error of naive attention",
        figures={"largest error": Figure(worst.found, ""), "of naive attention": Figure(worst.naive, "")},
        reason="; ".join(wrong) or None,
    )
