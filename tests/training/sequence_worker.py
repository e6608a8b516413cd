"""Run under torchrun by test_sequence_parallel."""

import sys

import torch
from split_runs import train
from two_processes import leave_together

if __name__ == "__main__":
    output, sequence_parallel, *names = sys.argv[1:]
    for name in names:
        result = train(name, output, int(sequence_parallel))
        if torch.distributed.get_rank() == 0:
            torch.save(result, f"{output}/{name}.pt")
    leave_together()
