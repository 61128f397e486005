"""Settings of mixtures of experts: what is refused before anything starts, and what a config.json may state."""

from typing import Any

import pytest

from megatron_fipo.config import Config, ModelConfig, ParallelConfig, RolloutConfig, RouterConfig, validate
from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.config.gpu_rules import check_fp8_experts
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import find_family

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}


def translate(**changes: Any):
    config = {key: value for key, value in (QWEN3_MOE | changes).items() if value is not ...}
    return find_family(config).translate(config)


def test_experts_of_a_config():
    experts = translate().experts
    assert (experts.count, experts.per_token, experts.ffn_hidden_size, experts.normalized) == (8, 2, 40, True)
    assert experts.dense_layers == ()
    assert translate(num_experts=..., num_local_experts=8).experts == experts, "as transformers 5 saves it"
    assert translate(norm_topk_prob=...).experts.normalized is False


def test_dense_layers_among_experts():
    architecture = translate(decoder_sparse_step=2, mlp_only_layers=[1])
    assert architecture.experts.dense_layers == (0, 1, 2, 4)
    assert [architecture.has_experts(layer) for layer in range(6)] == [False, False, False, True, False, True]
    assert translate(mlp_only_layers=list(range(6))).experts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_expert_intermediate_size": 40}, "shared_expert_intermediate_size=40 is not supported"),
        ({"n_group": 4}, "n_group=4 is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ({"moe_intermediate_size": ...}, "'moe_intermediate_size' is missing"),
        ({"num_experts": ...}, "'num_local_experts' is missing"),
        ({"num_local_experts": 4}, "num_experts=8 and num_local_experts=4 differ"),
        ({"num_experts": 10**9}, "num_experts=1000000000 is more than the 4096"),
        ({"mlp_only_layers": False}, "mlp_only_layers has to be a list of layer numbers, not False"),
        ({"num_experts": 0}, "num_experts has to be a positive integer, not 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob has to be true or false, not 1"),
        ({"mlp_only_layers": [6]}, "mlp_only_layers names layer 6, but there are 6 layers"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers has to be a list of layer numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step has to be a positive integer, not 0"),
    ],
)
def test_other_mixtures_are_refused_with_the_key(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        translate(**changes)


SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"expert_model_parallel_size": 3, "data_parallel_size": 3},
            "=3 does not divide the model's 8 experts",
        ),
        (
            {"expert_model_parallel_size": 16, "data_parallel_size": 16},
            "=16 does not divide the model's 8 experts",
        ),
        ({**SP2, "expert_tensor_parallel_size": 16}, "does not divide the experts' feed-forward width of 40"),
        (
            {"expert_model_parallel_size": 4, "data_parallel_size": 2},
            "does not divide the 2 ranks of a pipeline stage",
        ),
        ({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "does not divide the 1 ranks"),
        ({"tensor_model_parallel_size": 2}, "with experts needs parallel.sequence_parallel=true"),
    ],
)
def test_layouts_that_do_not_divide_the_experts(sizes, message):
    with pytest.raises(UserError, match=message):
        check_divisibility(translate(), ParallelConfig(**sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_model_parallel_size": 8, "data_parallel_size": 8},
        {"expert_model_parallel_size": 2, **SP2},
        {"expert_tensor_parallel_size": 2, "expert_model_parallel_size": 4, "context_parallel_size": 8},
    ],
)
def test_layouts_that_do(sizes):
    check_divisibility(translate(), ParallelConfig(**sizes))


@pytest.mark.parametrize("key", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_a_dense_model_has_no_experts_to_share(key):
    dense = translate(mlp_only_layers=list(range(6)))
    with pytest.raises(UserError, match=f"parallel.{key}=2 needs a model with experts"):
        check_divisibility(dense, ParallelConfig(data_parallel_size=2, **{key: 2}))


def config(router: RouterConfig, deterministic: bool = False, **rollout: Any) -> Config:
    rollout = {"max_response_length": 512, "max_prompt_length": 64, **rollout}
    return Config(
        model=ModelConfig(path="m", router=router),
        rollout=RolloutConfig(**rollout),
        deterministic=deterministic,
        run_dir="r",
    )


@pytest.mark.parametrize(
    ("router", "settings", "message"),
    [
        ({"load_balancing": 0.01}, {}, "model.router.load_balancing=0.01 trains the router"),
        ({"replay": "rollout"}, {"engine": "local"}, "local does not report"),
        (
            {"replay": "rollout"},
            {"engine": "vllm", "temperature": 0.7},
            "needs rollout.temperature=1, not 0.7",
        ),
        (
            {"replay": "rollout"},
            {"engine": "vllm", "deterministic": True},
            "which deterministic=true turns off",
        ),
    ],
)
def test_routers_that_cannot_do_what_they_are_asked_for(router, settings, message):
    with pytest.raises(UserError, match=message):
        validate(config(RouterConfig(**router), **settings), translate())


def test_routes_of_the_engine_need_experts():
    wanted = config(RouterConfig(replay="rollout"), engine="vllm")
    with pytest.raises(UserError, match="needs more than one expert per token"):
        validate(wanted, translate(num_experts_per_tok=1, norm_topk_prob=False))
    with pytest.raises(UserError, match="needs a model with experts"):
        validate(wanted, translate(mlp_only_layers=list(range(6))))


def test_fp8_needs_experts_of_a_width_that_it_can_multiply():
    wanted = config(RouterConfig(), engine="vllm")
    wanted.model.fp8 = "hybrid"
    with pytest.raises(UserError, match="the experts' width of 40 is sharded over"):
        validate(wanted, translate())
    check_fp8_experts(48, ParallelConfig())
    with pytest.raises(UserError, match="expert_tensor_parallel_size=2; lower that"):
        check_fp8_experts(48, ParallelConfig(expert_tensor_parallel_size=2))
