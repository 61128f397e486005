"""The run of TRL that `tools/bench/trl_countdown.py` measures: its log is what TRL itself counts."""

from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.phases import PHASES
from megatron_fipo.run_dir.metrics_log import read_metrics
from tests.pages import ROOT
from tools.bench.process_tree import Ended
from tools.bench.trl_countdown import CONFIG, result
from tools.bench.trl_run import train

SMALL = [
    "iterations=2",
    "evaluation.every=1",
    "batch.prompts_per_iteration=4",
    "batch.mini_batch_prompts=2",
    "batch.responses_per_prompt=4",
    "rollout.max_response_length=64",
    "data.evaluation_size=6",
]
RESPONSES = 16


@pytest.mark.parametrize("plain_generate", [False, True])
def test_the_log_is_what_trl_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_generate: bool
) -> None:
    monkeypatch.chdir(ROOT)
    trainer = train(load_config(CONFIG, [*SMALL, f"run_dir={tmp_path}"]), plain_generate)
    of_trl = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    records = read_metrics(tmp_path)
    iterations = [record.values for record in records if record.kind == "iteration"]
    assert [record.iteration for record in records if record.kind == "evaluation"] == [0, 1, 2]
    assert len(of_trl) == len(iterations) == 2
    for seen, values in zip(of_trl, iterations, strict=True):
        assert values["reward/mean"] == pytest.approx(seen["reward"], abs=1e-4)
        assert values["tokens/used"] == pytest.approx(RESPONSES * seen["completions/mean_length"], abs=0.5)
        assert values["rollout/prompts"] == 4
        phases = [values[f"time/{phase.name}"] for phase in PHASES]
        assert sum(phases) == pytest.approx(values["time/total"])
        assert all(values[f"time/{name}"] > 0 for name in ("rollout", "old_log_probs", "update"))
    run = result("TRL", 1, 0.0, Ended(0, 1.0, 1), records)
    assert run.length.keys() == run.accuracy.keys() == {0, 1, 2}
    assert all(21 <= length <= 64 for length in run.length.values())
    assert len(run.iterations["tokens per second"]) == 2
