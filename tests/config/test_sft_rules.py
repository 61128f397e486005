"""Settings of supervised training against each other, the model and the machine."""

import pytest

from megatron_fipo.config import SftConfig, SftOptimizerSettings, load_config, validate_sft
from megatron_fipo.config.sft_rules import rate_note
from megatron_fipo.environment import Machine
from megatron_fipo.errors import UserError
from tests.model.test_architecture import ARCHITECTURE


def test_supervised():
    def sft(*overrides):
        return load_config(None, ["model_config_path=m", "output_dir=o", *overrides], SftConfig)

    validate_sft(sft(), ARCHITECTURE, Machine(cpus=1, gpus=0))
    for override, message in [
        ("steps=0", "steps"),
        ("optimizer.warmup_steps=1001", "warmup_steps"),
        ("parallel.tensor_model_parallel_size=4", "key-value heads"),
        ("parallel.data_parallel_size=2", "CPU core"),
    ]:
        with pytest.raises(UserError, match=message):
            validate_sft(sft(override), ARCHITECTURE, Machine(cpus=1, gpus=0))
    with pytest.raises(UserError, match="needs dtype=bfloat16, not float32"):
        validate_sft(sft("layer_spec=transformer_engine"), ARCHITECTURE, Machine(cpus=1, gpus=1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model_config_path=m"], "both given"),
        (["model_path=null"], "both absent"),
        (["data.source=countdown"], r"remove data\.path"),
        (["data.path=null"], r"data\.source=jsonl needs data\.path"),
        (["data.held_out_path=b", "data.held_out_share=0.1"], "are both given"),
        (["data.max_length=65"], r"data\.max_length=65 must be at most tokens_per_step=64"),
        (
            ["parallel.context_parallel_size=2", "data.max_length=63", "max_tokens_per_micro_batch=63"],
            r"data\.max_length=63 \(64 as a multiple of 4\) must be at most max_tokens_per_micro_batch=63",
        ),
        (
            ["data.max_length=40000", "tokens_per_step=40000"],
            "exceeds the model's max_position_embeddings",
        ),
    ],
)
def test_supervised_rows(overrides, message):
    given = ["model_path=m", "output_dir=o", "data.source=jsonl", "data.path=a", "data.max_length=64"]
    given += ["tokens_per_step=64"]
    validate_sft(load_config(None, given, SftConfig), ARCHITECTURE)
    with pytest.raises(UserError, match=message):
        validate_sft(load_config(None, [*given, *overrides], SftConfig), ARCHITECTURE)


def test_supervised_rows_of_a_function_need_no_file():
    given = ["model_path=m", "output_dir=o", "data.source=my_rows:rows", "data.max_length=64"]
    validate_sft(load_config(None, given, SftConfig), ARCHITECTURE)


@pytest.mark.parametrize(
    ("path", "lr", "noted"), [("model", 3e-3, True), ("model", 1e-5, False), (None, 3e-3, False)]
)
def test_a_rate_for_random_weights_is_reported_on_trained_ones(path: str | None, lr: float, noted: bool):
    config = SftConfig(model_path=path, output_dir="out", optimizer=SftOptimizerSettings(lr=lr))
    assert (rate_note(config) is not None) == noted
