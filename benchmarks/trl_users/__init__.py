"""What users of TRL gain, workload by workload.

To add one: a file with a `Workload`, and a line here.
"""

from __future__ import annotations

from trl_users.dpo import PairPreferences
from trl_users.grpo import GivenSamples
from trl_users.interface import Workload
from trl_users.reward import RewardPairs

WORKLOADS: dict[str, Workload] = {item.name: item for item in (PairPreferences(), GivenSamples(), RewardPairs())}
"""By the name on the command line, in the order of the table."""
