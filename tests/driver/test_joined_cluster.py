"""The loss of a joined Ray cluster: its head accepts no connections for some time."""

from collections.abc import Iterator

import pytest

from megatron_fipo.driver import joined_cluster
from megatron_fipo.driver.cluster_loss import ClusterLostError, check_cluster, cluster_started
from megatron_fipo.driver.joined_cluster import watching
from megatron_fipo.network import LOOPBACK, listen


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(joined_cluster, "PERIOD_S", 0.02)
    monkeypatch.setattr(joined_cluster, "LOST_AFTER_S", 0.1)
    yield
    cluster_started()  # forgets the loss


def test_a_head_that_accepts_no_connections_is_a_lost_cluster():
    with listen(LOOPBACK) as head:
        address = f"{LOOPBACK}:{head.getsockname()[1]}"
        with watching(address):
            check_cluster(0.4)
            head.close()
            with pytest.raises(
                ClusterLostError, match=f"Ray's head at {address} has not answered for 0.1 s; run the same"
            ):
                check_cluster(10)


def test_a_head_that_ends_after_the_run_is_no_loss():
    with listen(LOOPBACK) as head, watching(f"{LOOPBACK}:{head.getsockname()[1]}"):
        pass
    check_cluster(0.4)
