"""What one rank prints: the messages in `EXPECTED` and `GPT_MODEL`, each with its cause, and no others.

The rank is a process of its own, since Python shows a warning once per process. docs/megatron-core-versions.md has the same
list, with the messages of GPUs.
"""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_fipo.model.mcore import VERSION
from tests.distributed.tiny import write_model

NEEDS_HYBRID_MODEL = pytest.mark.skipif(VERSION < (0, 19), reason="HybridModel came with Megatron-Core 0.19")
REPOSITORY = Path(__file__).parents[2]
STEP_AND_SAVE = """
    import sys
    from pathlib import Path

    import torch.distributed as dist

    from megatron_fipo.checkpoint.distributed import CheckpointWriter
    from megatron_fipo.config import ParallelConfig
    from megatron_fipo.model import mcore
    from tests.distributed.test_expert_checkpoint import new_policy
    from tests.distributed.test_policy_grid import FIPO

    folder, target, store = map(Path, sys.argv[1:4])
    mcore.USES_HYBRID_MODEL = sys.argv[4] == "HybridModel"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    policy, shards = new_policy(folder, ParallelConfig(), {"trainable": True, "load_balancing": 0.01})
    policy.policy_step(shards, FIPO, lr=1e-3)
    CheckpointWriter().start(policy.modules, policy.optimizer, target, asynchronous=False)
    dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Message:
    """A line that a rank prints."""

    pattern: str
    reason: str
    printed: bool = True
    """Whether the installed versions print it."""


GPT_MODEL = Message(
    "GPTModel IS DEPRECATED",
    "its successor is HybridModel, which mcore.USES_HYBRID_MODEL chooses",
    VERSION >= (0, 19),
)
EXPECTED = [
    Message(
        "MCore's async save is deprecated",
        "its successor, nvidia-resiliency-ext 0.6, needs CUDA; a synchronous save prints this too",
        VERSION >= (0, 17),
    ),
    Message(
        "MimoModelConfig is experimental",
        "get_megatron_optimizer imports Megatron-Core's multimodal models, which have another optimizer",
        VERSION >= (0, 19),
    ),
    Message(
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        "Megatron-Core's distributed optimizer looks at the gradients of its float32 shards, which are views",
    ),
    *(
        Message(
            rf"`torch\.distributed\.{name}` is deprecated",
            "Megatron-Core calls it; torch 2.13 has renamed it",
            hasattr(dist, "all_gather_single"),
        )
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor")
    ),
]


def messages(output: str) -> list[str]:
    """The lines of a rank's output, without the source lines that Python prints with a warning."""
    lines = output.splitlines()
    return [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if not (re.match(r"\S+:\d+: \w*Warning: ", before) and line.startswith("  "))
    ]


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("qwen2", "GPTModel"),
        ("qwen3_moe-mixed", "GPTModel"),
        pytest.param("qwen3_moe-mixed", "HybridModel", marks=NEEDS_HYBRID_MODEL),
    ],
)
def test_a_rank_prints_what_is_expected_and_no_more(tmp_path, family, model):
    """Nor less, so that the list has no entry without a cause."""
    folder, target = write_model(tmp_path / "model", family=family), tmp_path / "checkpoint"
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STEP_AND_SAVE), folder, target, tmp_path / "store", model],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert (target / "metadata.json").exists()
    found = messages(done.stdout)
    expected = [*EXPECTED, GPT_MODEL] if model == "GPTModel" else EXPECTED
    printed = [message for message in expected if message.printed]
    unexpected = [line for line in found if not any(re.search(message.pattern, line) for message in printed)]
    assert unexpected == []
    absent = [
        message.pattern for message in printed if not any(re.search(message.pattern, line) for line in found)
    ]
    assert absent == []
