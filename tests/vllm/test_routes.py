"""Routes that the real vLLM reports, compared with those of transformers.

vLLM reports them with its newer model runner alone, which needs Triton. On a CPU that is Triton's interpreter here: a process
with a Triton backend of the name that vLLM looks for. So this is also the newer runner's log-probs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.errors import UserError
from tests.tiny_qwen3_moe import save_qwen3_moe
from tests.vllm.conftest import ROOT
from tests.vllm.routes_run import LENGTHS

TRITON = Path(sys.prefix) / "triton"
"""Where `make venv-triton` installs Triton beside a torch that has none."""
DRIVER = """\
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty): ...
    def get_current_target(self): ...
    def get_active_torch_device(self): ...
    def get_benchmarker(self): ...
"""
COMPILER = """\
from triton.backends import compiler


class InterpretedBackend(compiler.BaseBackend):
    supports_target = staticmethod(lambda target: False)

    def hash(self): ...
    def parse_options(self, options): ...
    def add_stages(self, stages, options): ...
    def load_dialects(self, context): ...
    def get_module_map(self): ...
"""


def save_backend(folder: Path) -> Path:
    """A distribution with the Triton backend `cpu`: it says that it is active, and compiles nothing."""
    package, description = folder / "interpreted_triton", folder / "interpreted_triton-1.dist-info"
    package.mkdir()
    description.mkdir()
    (package / "__init__.py").touch()
    (package / "driver.py").write_text(DRIVER)
    (package / "compiler.py").write_text(COMPILER)
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted-triton\nVersion: 1\n")
    (description / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted_triton\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tuple(save_qwen3_moe(tmp_path_factory.mktemp("experts"), seed) for seed in (0, 1))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def records(folders, tmp_path_factory) -> list[dict[str, Any]]:
    """The lines of routes_run.py."""
    if importlib.util.find_spec("triton") is None and not TRITON.exists():
        pytest.skip("needs `make venv-triton`")
    path = [str(save_backend(tmp_path_factory.mktemp("backend"))), str(ROOT), str(TRITON)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",  # an engine of this session may have set it to 0
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests/vllm/routes_run.py", *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def answers(records) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] != "status"]


def expected(folder: Path, record: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(routes [tokens, layers with experts, k], log-probs of the response) of transformers for context and response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([*record["context"], *record["response"]])
    with torch.no_grad():
        output = model(tokens[None], output_router_logits=True)
    routes = torch.stack([logits.topk(2, dim=-1).indices for logits in output.router_logits], dim=1)
    rows = torch.log_softmax(output.logits[0], -1)[len(record["context"]) - 1 : -1]
    return routes, rows.gather(-1, tokens[len(record["context"]) :, None])[:, 0]


def test_every_computed_token_has_its_routes(records, answers, folders):
    """Prompt, prefix and response up to the last token but one: also if they were cached, preempted or computed in chunks."""
    (status,) = [record for record in records if record["event"] == "status"]
    assert status["hits"] > 0
    assert status["preemptions"] > 0
    assert Counter(record["event"] for record in answers) >= Counter(
        {event: len(LENGTHS) for event in ("first", "cached", "aborted", "never started", "pushed")}
    )
    compared = 0
    for record in answers:
        if record["routes"] is None:
            assert record["finish_reason"] == "abort"
            assert not record["response"]
            continue
        routes, log_probs = expected(folders[record["event"] == "pushed"], record)
        reported = torch.tensor(record["routes"])
        assert record["dtype"] == "uint8"
        assert len(reported) == len(routes) - 1 - record["routed"]
        assert reported.shape[1] == 3, "a column for the layer without experts too"
        assert torch.equal(reported[:, 1:], routes[record["routed"] : -1])
        torch.testing.assert_close(torch.tensor(record["log_probs"]), log_probs, atol=1e-4, rtol=0)
        compared += len(reported)
    assert compared > 1000


def test_a_continued_response_has_the_routes_that_were_missing(answers):
    """Those of the last token of its first part, and of the tokens after it."""
    continued = [record for record in answers if record["event"] == "continued"]
    assert any(record["routed"] for record in continued)
    for record in continued:
        assert (
            len(record["routes"]) == len(record["context"]) + len(record["response"]) - 1 - record["routed"]
        )


def test_what_excludes_routes(folders, run, monkeypatch):
    """Without a Triton for CPUs vLLM has no newer model runner; the user may have chosen the older one."""
    from vllm.triton_utils import HAS_TRITON

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    engine = VLLMEngine(str(folders[0]), "float32", max_model_len=64, routes=True)
    if not HAS_TRITON:
        with pytest.raises(UserError, match=r"needs Triton; .* choose model\.router\.replay=old_log_probs"):
            run(engine.ready())
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(UserError, match=r"env\.VLLM_USE_V2_MODEL_RUNNER=0 excludes .*; remove it"):
        run(engine.ready())
