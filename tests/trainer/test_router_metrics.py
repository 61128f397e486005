"""Counts of routes: loads of experts, and the comparison of the rollout engine's routes with the router's own."""

from types import SimpleNamespace

import pytest
import torch

from megatron_fipo.model.routing import missing_route, route_dtype, usable_routes
from megatron_fipo.trainer.router_metrics import RouterCounts


def chunk(*layers: int) -> SimpleNamespace:
    return SimpleNamespace(layers=list(layers))


def routes(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def test_loads_are_relative_to_the_mean_of_their_layer_and_layers_without_experts_do_not_count():
    counts = RouterCounts.zeros(layers=4, experts=4, device=torch.device("cpu"))
    even, uneven = routes((0, 1), (2, 3)), routes((0, 1), (0, 2))
    counts.add([chunk(1), chunk(3)], [[[even], [uneven]], [[even], [uneven]]])
    assert counts.experts[1].tolist() == [2, 2, 2, 2]
    assert counts.experts[3].tolist() == [4, 2, 2, 0]
    assert counts.metrics() == {"router/load_max": (1 + 2) / 2, "router/load_min": (1 + 0) / 2}


def test_routes_of_the_engine_are_compared_as_sets_and_missing_ones_count_apart():
    counts = RouterCounts.zeros(layers=1, experts=4, device=torch.device("cpu"))
    missing = missing_route(torch.uint8)
    engine = routes((1, 0), (2, 3), (missing, missing), (1, 2))
    chosen = routes((0, 1), (2, 1), (0, 1), (1, 2))
    counts.add([chunk(0)], [[[chosen]]])
    counts.compare([chunk(0)], [[[engine]]], [[[chosen]]])
    metrics = counts.metrics()
    assert metrics["router/missing"] == 1 / 4
    assert metrics["router/differing"] == pytest.approx(1 / 3)


def test_routes_that_no_router_chose_are_missing():
    given = torch.tensor([[0, 1], [0, 0], [3, 3], [-1, -1], [1, 4], [3, 0]], dtype=torch.int16)
    found = usable_routes(given, experts=4)
    missing = missing_route(torch.uint8)
    assert found.dtype == torch.uint8
    assert found.tolist() == [[0, 1], *[[missing] * 2] * 4, [3, 0]]


@pytest.mark.parametrize(("experts", "dtype"), [(128, torch.uint8), (255, torch.uint8), (256, torch.int16)])
def test_the_missing_route_is_no_expert(experts, dtype):
    assert route_dtype(experts) is dtype
    assert missing_route(dtype) >= experts
