"""The layout of the gradient buffers that this package hands to Megatron-Core is the one that it computes itself."""

import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallel

from megatron_fipo.config import ParallelConfig
from megatron_fipo.model import mcore
from tests.distributed.test_experts import LAYOUTS, new_policy
from tests.distributed.tiny import write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not mcore.HAS_PARAMETER_LAYOUT, reason="Megatron-Core 0.16 and 0.17 take no layout"
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as folder:
        yield write_model(Path(folder) / "model", family="qwen3_moe-mixed")


def both_layouts(rank, world_size, folder, parallel, bucket_size):
    """Whether a layout was given, and for each chunk the layouts of its buffers: ours, and Megatron-Core's own."""
    policy = new_policy(folder, parallel, trainable=True)
    compared = []
    for index, chunk in enumerate(policy.chunks):
        settings = replace(chunk.ddp_config, bucket_size=bucket_size)
        arguments = (policy.model_config, deepcopy(settings), policy.modules[index], index > 0)
        own = mcore.parameter_layout(policy.modules[index], settings, index > 0)
        assert list(own) == ["full_param_layout"]
        megatrons = DistributedDataParallel(*arguments).full_param_layout
        compared.append((describe(own["full_param_layout"]), describe(megatrons)))
    return compared


def describe(layout):
    """By buffer, everything of its layout, with parameters by their identity."""
    return {
        str(key): {
            **vars(buffer),
            "param_index_map": [(id(name), place) for name, place in buffer.param_index_map.items()],
        }
        for key, buffer in layout.layouts.items()
    }


@pytest.mark.parametrize("bucket_size", [None, 5_000])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", ["1", "dp2-ep2", "pp2-vpp2-cp2-ep2", "dp4-ep2"])
def test_the_layout_is_megatrons_own(folder, layout, overlap, bucket_size):
    parallel: ParallelConfig = replace(LAYOUTS[layout], overlap_communication=overlap)
    results = run_ranks(parallel.world_size, both_layouts, folder, parallel, bucket_size)
    pairs = [pair for of_rank in results for pair in of_rank]
    for own, megatrons in pairs:
        assert own == megatrons
    assert max(len(own) for own, _ in pairs) == (1 if layout == "1" else 2)  # experts of several ranks apart
    buckets = [len(buffer["bucket_indices"]) for buffer in results[0][0][0].values()]
    assert (max(buckets) > 1) == (overlap and bucket_size is not None)
