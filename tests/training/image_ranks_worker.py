"""Run under torchrun by test_image_ranks."""

import sys

from image_runs import train_with_images
from two_processes import leave_together

if __name__ == "__main__":
    train_with_images(*sys.argv[1:])
    leave_together()
