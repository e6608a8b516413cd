"""Forward and backward of some kernels, for a memory checker to watch:

python benchmarks/gpu_run/memcheck_target.py cuda_flash efficient
"""

from __future__ import annotations

import sys

import torch

from gpu_run.kernel_cases import KernelCase, gradients


def main() -> None:
    run(sys.argv[1:], torch.device("cuda"), torch.bfloat16)
    torch.cuda.synchronize()
    print("ran to its end")


def run(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Two settings of each backend."""
    for backend in backends:
        for packing, group, head_dim in (("phi3", 4, 128), ("gpt_neox", 1, 80)):
            case = KernelCase(backend=backend, packing=packing, head_dim=head_dim, group=group, dtype=dtype)
            gradients(case, device)


if __name__ == "__main__":
    main()
