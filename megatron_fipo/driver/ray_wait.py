"""Waiting for Ray without waiting for a dead cluster."""

import math
import time
from collections.abc import Sequence
from typing import Any

import ray

from megatron_fipo.driver.cluster_loss import check_cluster

CHECK_EVERY_S = 0.5
"""Seconds between two looks at whether the cluster still runs."""


def wait_for_one(references: Sequence[Any], timeout_s: float = math.inf) -> list[Any]:
    """Wait until the result of a reference is there, an error too, and return such references; none after `timeout_s`.

    Raises `ClusterLostError` if the cluster is lost.
    """
    until = time.monotonic() + timeout_s
    while True:
        check_cluster()
        left = until - time.monotonic()
        done, _ = ray.wait(list(references), num_returns=1, timeout=max(0.0, min(left, CHECK_EVERY_S)))
        if done or left <= CHECK_EVERY_S:
            return done
