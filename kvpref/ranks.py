"""How many processes were started, according to the environment that launchers set."""

from __future__ import annotations

import os

from kvpref.errors import InputError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIZES = ("WORLD_SIZE", *_MPI_SIZES)
"""Variables of torchrun and accelerate, and of three kinds of mpirun; the names that accelerate reads."""

_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def num_started() -> int:
    """Number of processes in this run; 1 unless a launcher says otherwise."""
    found = [os.environ[name] for name in _SIZES if name in os.environ]
    return max([1, *(int(value) for value in found if value.isdecimal())])


def own_rank() -> int:
    """The rank of this process; 0 unless a launcher says otherwise."""
    found = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return int(found) if found.isdecimal() else 0


def is_one_of_many() -> bool:
    """Whether a launcher started this process as one of several, and set its rank."""
    return num_started() > 1 and any(name in os.environ for name in _RANKS)


def check_start(num_devices: int) -> None:
    """Check that the processes of a run can find one another and that each has a device.

    Args:
        num_devices: Accelerators of this machine that this process sees; 0 to train on the CPU.

    Raises:
        InputError: If not; the message says how to start them.
    """
    by_mpi = any(name in os.environ for name in _MPI_SIZES)
    if not by_mpi and num_started() > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise InputError(
            f"WORLD_SIZE is {num_started()}, but RANK and LOCAL_RANK are not both set, so the processes cannot find "
            "one another; start them with kvpref train --num-processes N or torchrun --nproc-per-node N, or unset "
            "WORLD_SIZE to train alone"
        )
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # A launcher may show each process only its own device, always as the first.
    one_each = num_devices == 1 and any(name in os.environ for name in _VISIBLE)
    if 0 < num_devices < num_local and not one_each:
        raise InputError(
            f"{num_local} processes were started on a machine with {num_devices} accelerator(s), and each needs one "
            f"of its own; start {num_devices} (--num-processes or --nproc-per-node {num_devices}), or set use_cpu=True"
        )


def check_all_joined(num_joined: int, *, is_distributed: bool) -> None:
    """Check that all processes train together, or each would write its own model into the same folder.

    Args:
        num_joined: Processes that the trainer knows of.
        is_distributed: Whether gradients are averaged over them.

    Raises:
        InputError: If they do not.
    """
    expected = num_started()
    if expected <= num_joined and (is_distributed or num_joined == 1):
        return
    found = f"the trainer sees {num_joined}" if num_joined < expected else "their gradients would not be averaged"
    raise InputError(
        f"{expected} processes were started (WORLD_SIZE), and {found}; an Accelerator or PartialState that was made "
        "before the training arguments may be the cause (use_configured_state), or a device or ddp_backend that "
        "accelerate does not run in parallel. Set use_cpu=True for the CPU, or start one process"
    )


def refuse_many(command: str) -> None:
    """Raise InputError if several processes were started for a single-process command."""
    if num_started() > 1:
        raise InputError(
            f"{command} runs in one process, and {num_started()} were started (WORLD_SIZE): each would do all of the "
            "work and write the same files; start it without torchrun"
        )
