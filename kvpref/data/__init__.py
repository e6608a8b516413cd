"""Preference data: reading, tokenization to groups, and the plan of steps and micro-batches.

Importing this package imports neither torch nor transformers nor datasets.
"""

from kvpref.data.batching.costs import CostModel, Mode, work_of
from kvpref.data.batching.group_costs import Waits
from kvpref.data.batching.lengths import GroupLengths, measure_group
from kvpref.data.batching.sampling import RankStep, StepSampler
from kvpref.data.batching.sharing import Clusters, find_clusters
from kvpref.data.batching.steps import BatchedStep, MicroBatch, StepBatcher, StepOptions
from kvpref.data.dataset import DataOptions, OnBadRow, PreferenceDataset
from kvpref.data.loading import load_preferences
from kvpref.data.reading.processors import load_processor
from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.data.reading.trajectories.attempts import TrajectoryGroups
from kvpref.data.report import BadRow, DataReport
from kvpref.data.statistics import (
    BatchStatistics,
    DataStatistics,
    ImageStatistics,
    summarize_batches,
    summarize_dataset,
)
from kvpref.data.summaries import LengthSummary
from kvpref.data.trajectory_statistics import TrajectoryStatistics

__all__ = [
    "BadRow",
    "BatchStatistics",
    "BatchedStep",
    "Clusters",
    "CostModel",
    "DataOptions",
    "DataReport",
    "DataStatistics",
    "GroupLengths",
    "ImageStatistics",
    "LengthSummary",
    "MicroBatch",
    "Mode",
    "OnBadRow",
    "PreferenceDataset",
    "RankStep",
    "StepBatcher",
    "StepOptions",
    "StepSampler",
    "TrajectoryGroups",
    "TrajectoryStatistics",
    "Waits",
    "find_clusters",
    "load_preferences",
    "load_processor",
    "load_tokenizer",
    "measure_group",
    "summarize_batches",
    "summarize_dataset",
    "work_of",
]
