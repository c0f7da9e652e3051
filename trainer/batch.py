"""What a batch holds.

The arrays of both layouts are listed at `ExpertTrajectoryIterator`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Layout = Literal["tutorial", "native"]
Batch = dict[str, Tensor]
