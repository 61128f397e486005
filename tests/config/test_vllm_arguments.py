"""`rollout.vllm`: which arguments of vLLM's engine a user may set. tests/vllm compares the names with vLLM's own."""

import re
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.config import vllm_arguments as arguments
from megatron_fipo.config.vllm_arguments import OWNED, SPEED_ONLY, check_arguments, kv_element_bytes
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.settings_change import _free_keys

NAMES = [*OWNED, *SPEED_ONLY, "kv_cache_dtype", "quantization", "speculative_config", "_api_process_count"]
PAGE = Path(__file__).parents[2] / "docs/rollout-engines.md"


def config(*overrides: str):
    return load_config(None, ["model.path=m", "run_dir=r", "rollout.engine=vllm", *overrides])


@pytest.fixture(autouse=True)
def names(monkeypatch):
    monkeypatch.setattr(arguments, "known_arguments", lambda: NAMES)


@pytest.mark.parametrize(
    "override",
    [
        "rollout.vllm={}",
        "rollout.vllm={max_num_seqs: 256, max_num_batched_tokens: 16384, quantization: fp8, kv_cache_dtype: fp8}",
        "rollout.vllm={compilation_config: {cudagraph_mode: FULL}, enforce_eager: true, enable_chunked_prefill: true}",
        "rollout.vllm.speculative_config={method: ngram, num_speculative_tokens: 3}",
    ],
)
def test_accepted(override):
    check_arguments(config(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "rollout.vllm.kv_cache_dtyp=fp8",
            r"rollout.vllm.kv_cache_dtyp: .* \(did you mean kv_cache_dtype\?\)",
        ),
        ("rollout.vllm._api_process_count=2", "no such argument"),
        ("rollout.vllm.dtype=float16", "rollout.vllm.dtype is not free: set model.dtype"),
        ("rollout.vllm.max_num_seqs=0", "max_num_seqs must be an integer of at least 1, not 0"),
        ("rollout.vllm.max_num_seqs=many", "must be an integer of at least 1, not 'many'"),
        ("rollout.vllm.enable_prefix_caching=true deterministic=true", "needs .*enable_prefix_caching=false"),
        (
            "rollout.vllm.speculative_config={method: ngram} rollout.temperature=0.8",
            "speculative_config needs rollout.temperature=1, not 0.8",
        ),
        (
            "rollout.vllm.speculative_config={method: ngram} evaluation.min_p=0.1",
            "speculative_config needs evaluation.min_p=0, not 0.1",
        ),
        (
            "rollout.vllm.speculative_config={method: ngram} evaluation.sets={a: {path: p, min_p: 0.2}}",
            "needs evaluation.sets.a.min_p=0, not 0.2",
        ),
    ],
)
def test_refused(overrides, message):
    parts = re.split(r" (?=[a-z_]+(?:\.[a-z_]+)*=)", overrides)
    with pytest.raises(UserError, match=message):
        check_arguments(config(*parts))


def test_the_page_lists_the_arguments_that_are_refused():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {name: rows.get(name) for name in OWNED} == OWNED


def test_only_arguments_of_speed_may_change_in_a_run():
    def free(before: str, after: str) -> bool:
        return "rollout.vllm" in _free_keys(config(before), config(after))

    both = "rollout.vllm={quantization: fp8, max_num_seqs: 8}"
    assert free(both, "rollout.vllm={quantization: fp8, enforce_eager: true}")
    assert not free(both, "rollout.vllm={max_num_seqs: 8}")
    assert not free(both, "rollout.vllm={quantization: fp8, kv_cache_dtype: fp8}")


def test_bytes_of_the_kv_cache():
    assert [kv_element_bytes({"kv_cache_dtype": name}, 2) for name in ("auto", "bfloat16", "fp8_e4m3")] == [
        2,
        2,
        1,
    ]
    assert kv_element_bytes({}, 4) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("environment.stop=['']", "environment.stop must not contain an empty text"),
        ("environment.stop_token_ids=[5,-1]", "environment.stop_token_ids must be at least 0, not -1"),
    ],
)
def test_what_ends_a_turn_is_refused_if_every_turn_or_none_has_it(override, message):
    with pytest.raises(UserError, match=message):
        config(override)


def test_stop_strings_are_a_list_of_texts():
    assert config("rollout.stop=['</a>', '5']").rollout.stop == ("</a>", "5")
    with pytest.raises(UserError, match=r"rollout\.stop must not contain an empty string"):
        config("rollout.stop=['']")
    with pytest.raises(UserError, match=r"rollout\.stop must be a list"):
        config("rollout.stop=</a>")
