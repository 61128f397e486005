"""A trainer rank's memory by part, where it cannot be measured here: properties, and the parts of two recipes."""

from dataclasses import replace

import pytest

from megatron_fipo.config import ParallelConfig
from megatron_fipo.model.routing import route_dtype
from megatron_fipo.plan.experts import route_bytes
from megatron_fipo.plan.layout import chunks_in_flight, micro_batches
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.plan.workload import Assumptions
from tests.plan.cases import recipe_case
from tests.plan.machines import cpu_machine, toy_machine

GIB = 2**30


def parts(*overrides: str, stage: int = 0, name: str = "qwen2.5-32b", **case: object) -> dict[str, float]:
    breakdown = trainer_memory(recipe_case(name, *overrides, **case), stage)
    return {key: part.value for key, part in breakdown.parts.items()}


def test_the_32b_recipe_on_128_gpus_with_full_recomputation_uses_a_fifth_of_them():
    case = recipe_case("qwen2.5-32b")
    totals = [trainer_memory(case, stage).total.value / GIB for stage in range(4)]
    assert all(11 < total < 15 for total in totals)
    assert totals[0] == max(totals)
    assert 28 < trainer_memory(recipe_case("qwen2.5-32b", "model.recompute=none"), 0).total.value / GIB < 36


def test_every_part_is_in_the_total_and_none_is_negative():
    breakdown = trainer_memory(recipe_case("qwen2.5-32b"), 3)
    assert breakdown.total.value == pytest.approx(sum(part.value for part in breakdown.parts.values()))
    assert all(0 <= part.low <= part.value <= part.high for part in breakdown.parts.values())


def test_full_recomputation_keeps_a_layers_input_alone():
    """1,408 tokens of 5,120 in bfloat16, 16 layers, 4 micro-batches in flight."""
    found = parts()
    assert found["activations"] == 1408 * 5120 * 2 * 16 * 4
    assert found["layer workspace"] > parts("model.recompute=none")["layer workspace"]


def test_selective_recomputation_is_nothing_with_transformer_engine():
    """Its attention keeps no matrix of probabilities that could be computed again."""
    assert parts("model.recompute=selective") == parts("model.recompute=none")


def test_activations_of_a_layer_without_recomputation():
    """1,408 tokens of the residual stream, 11,264 of the products: 8h + 4q + 4k + 6f bytes, and 4 per head and token."""
    h, q, k, f, heads = 5120, 5120 // 8, 1024 // 8, 27648 // 8, 40 // 8
    layer = 1408 * 8 * h + 11264 * (4 * q + 4 * k + 6 * f + 4 * heads)
    assert parts("model.recompute=none")["activations"] == layer * 16 * 4


def test_only_an_output_stage_has_a_head():
    large = "head.workspace_mb=4096"
    assert [parts(large, stage=stage)["head"] > 0 for stage in range(4)] == [False, False, False, True]
    kept = parts(large, "head.logits_memory_mb=256", stage=3)["head"] - parts(large, stage=3)["head"]
    assert kept == 256 * 2**20


def test_a_tied_embedding_on_one_stage_needs_zeros_of_its_size():
    """The head returns them as the gradient of the weight, for autograd to add the embedding's own."""
    untied = recipe_case("qwen2.5-7b-math")
    architecture = replace(untied.architecture, share_embeddings_and_output_weights=True)
    workspaces = [
        trainer_memory(case, 0).parts["layer workspace"].value
        for case in (untied, replace(untied, architecture=architecture))
    ]
    assert workspaces[1] - workspaces[0] == 152_064 / 4 * 3584 * 2


def test_packs_shrink_with_data_parallel_ranks_and_shorter_responses():
    long = parts(stage=1)["packs"]
    assert parts("parallel.data_parallel_size=2", stage=1)["packs"] == pytest.approx(long / 2)
    short = parts(stage=1, assumptions=Assumptions(response_end=2000))["packs"]
    assert short < long / 3
    assert parts(stage=3)["packs"] > long  # old log-probs


def test_a_kl_term_keeps_the_initial_weights():
    assert "reference model" not in parts()
    found = parts("objective.name=grpo", "objective.kl_coefficient=0.1")
    assert found["reference model"] == found["weights"]


def test_a_colocated_engine_leaves_something_behind():
    colocated = ("rollout.placement=colocated", "rollout.engine_tensor_parallel_size=1")
    assert "sleeping engine" not in parts()
    breakdown = trainer_memory(recipe_case("qwen2.5-7b-math", *colocated), 0)
    assert "sleeping engine" in breakdown.total.not_calibrated
    assert breakdown.parts["sleeping engine"].value > 0


def test_the_allocator_and_cuda_come_on_top():
    exact = toy_machine()
    found = parts(machine=exact)
    tensors = sum(
        value for name, value in found.items() if name not in ("fragmentation", "CUDA and libraries")
    )
    assert found["fragmentation"] == pytest.approx(tensors * exact.fragmentation.value)
    assert found["CUDA and libraries"] == exact.reserved_bytes.value


def test_offloading_moves_optimizer_state_only():
    device, host = parts(), parts("optimizer.cpu_offload=1.0")
    assert host["optimizer"] == 0
    assert host["activations"] == device["activations"]


class TestExperts:
    """Qwen3-30B-A3B: tp 2 with sequence parallelism, two stages, dp 4, ep 8, micro-batches of 22,528 tokens."""

    TOKENS, LAYERS = 22_528 // 2, 24

    def parts(self, *overrides: str, load: float = 1.0, **case: object) -> dict[str, float]:
        assumptions = Assumptions(expert_load=load)
        return parts(*overrides, name="qwen3-30b-a3b", assumptions=assumptions, **case)

    def activations(self, *overrides: str, load: float = 1.0) -> float:
        """Per token of the residual stream and layer: of a stage without its dispatchers, two micro-batches in flight."""
        found = self.parts("model.recompute=none", *overrides, load=load)["activations"]
        return found / self.TOKENS / self.LAYERS

    def test_a_layer_keeps_every_copy_of_a_token(self):
        """8 copies with their input and 3 of the width in bfloat16, their places and weights; of the router the order of all
        128 scores; around them the residual stream, norms and the attention of both ranks' tokens, with head norms."""
        copies = 8 * (2 * (2048 + 3 * 768) + 12)
        router = 8 * 128 + 20 * 8
        query, key, heads = 4096 // 2, 512 // 2, 32 // 2
        attention = 2 * (2 * (2 * query + 2 * key) + 2 * (2 * query + 2 * key) + 4 * heads)
        kept = copies + router + 2 * 4 * 2048 + attention
        dispatcher = 5 * 128 + 8 * 8
        assert self.activations() == pytest.approx(2 * kept + dispatcher)

    def test_a_fuller_rank_keeps_more_copies(self):
        copies = 2 * 8 * (2 * (2048 + 3 * 768) + 12)
        assert self.activations(load=1.5) - self.activations() == pytest.approx(0.5 * copies)
        alone = "parallel.expert_model_parallel_size=1"
        assert self.activations(alone, load=1.5) == self.activations(alone)

    def test_recomputation_keeps_inputs_and_their_gradients(self):
        """Of two micro-batches in flight the input; of the last one the gradient too, and what the dispatcher has."""
        expected = 2 * 2 * 2048 + 2 * 2048 + 5 * 128 + 8 * 8
        assert self.parts()["activations"] == self.LAYERS * self.TOKENS * expected

    def test_the_workspace_holds_copies_in_several_orders(self):
        """Before and after they were sent, and the outputs in the order of experts and of ranks."""
        copies = 8 * self.TOKENS * 2048 * 2
        none, one = (
            self.parts("model.recompute=none", f"parallel.expert_model_parallel_size={size}")
            for size in (8, 1)
        )
        assert none["layer workspace"] == 4 * copies
        assert one["layer workspace"] == 3 * copies

    def test_routes_are_a_byte_per_token_layer_and_expert(self):
        """Of the tokens of an iteration, over dp 4 and the two sequence-parallel ranks."""
        tokens = recipe_case("qwen3-30b-a3b").workload().trained_tokens
        assert self.parts()["routes"] == pytest.approx(tokens / 8 * 24 * 8)
        assert "routes" not in self.parts("model.router.replay=none")
        assert "routes" not in parts()

    def test_routes_of_the_engine_travel_with_the_packs(self):
        """int16 for all 48 layers, of two of eight mini-steps."""
        tokens = recipe_case("qwen3-30b-a3b").workload().trained_tokens / 4
        more = self.parts("model.router.replay=rollout")["packs"] - self.parts()["packs"]
        assert more == pytest.approx(2 / 8 * tokens * 48 * 8 * 2)

    @pytest.mark.parametrize("experts", [2, 255, 256, 1024])
    def test_a_route_is_as_large_as_the_trainers(self, experts):
        case = recipe_case("qwen3-30b-a3b")
        routed = replace(case.architecture, experts=replace(case.architecture.experts, count=experts))
        found = route_bytes(replace(case, architecture=routed))
        assert found == 8 * route_dtype(experts).itemsize

    def test_layers_without_experts_keep_a_feed_forward_part(self):
        """Each kind is counted; a dense layer among them has a workspace of its own."""
        case = recipe_case("qwen3-30b-a3b", "model.recompute=none")
        all_of_them = trainer_memory(case, 0).parts["activations"].value
        mixed = replace(
            case.architecture, experts=replace(case.architecture.experts, dense_layers=(0, 1, 2, 30))
        )
        some = trainer_memory(replace(case, architecture=mixed), 0).parts["activations"].value
        wide = replace(mixed, ffn_hidden_size=2 * mixed.ffn_hidden_size)
        wider = trainer_memory(replace(case, architecture=wide), 0).parts["activations"].value
        assert some < all_of_them
        # three layers of this stage, two micro-batches of both ranks' tokens, 3 x 3,072 elements
        assert wider - some == pytest.approx(3 * 2 * 22_528 * 3 * 3072 * 2)

    def test_none_of_it_is_calibrated_on_gpus(self):
        breakdown = trainer_memory(recipe_case("qwen3-30b-a3b"), 0)
        assert breakdown.parts["activations"].not_calibrated == {"activations in this layout"}
        alone = recipe_case(
            "qwen3-30b-a3b",
            *(f"parallel.{name}_model_parallel_size=1" for name in ("tensor", "pipeline", "expert")),
            "parallel.sequence_parallel=false",
            "model.recompute=none",
        )
        assert trainer_memory(alone, 0).parts["activations"].not_calibrated


class TestBasis:
    """What an estimate rests on."""

    def activations(self, *overrides: str, **case: object):
        return trainer_memory(recipe_case("qwen2.5-7b-math", *overrides, **case), 0).parts["activations"]

    ONE_RANK = (
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "parallel.context_parallel_size=1",
        "batch.max_tokens_per_micro_batch=24576",
        "model.recompute=none",
    )

    def test_one_gpu_is_calibrated(self):
        found = self.activations(*self.ONE_RANK)
        assert found.sources == {"tensors of a step, one H200, 2026-11-28"}
        assert not found.not_calibrated

    def test_other_layouts_on_gpus_are_not_and_have_a_wider_interval(self):
        one, many = self.activations(*self.ONE_RANK), self.activations()
        assert many.not_calibrated == {"activations in this layout"}
        assert (many.high - many.low) / many.value > (one.high - one.low) / one.value

    def test_portable_layers_are_calibrated_on_a_cpu(self):
        overrides = ("model.dtype=float32", "model.layer_spec=portable")
        assert not self.activations(*overrides, machine=cpu_machine()).not_calibrated
        assert self.activations(*overrides).not_calibrated


def pipeline(pp: int, vpp: int | None = None) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)


@pytest.mark.parametrize(
    ("parallel", "count", "expected"),
    [
        (pipeline(1), 5, [1]),
        (pipeline(4), 8, [4, 3, 2, 1]),
        (pipeline(4), 2, [2, 2, 2, 1]),
        (pipeline(2, 2), 4, [5, 3]),
        (pipeline(4, 2), 8, [11, 9, 7, 5]),
        (pipeline(4, 2), 4, [8, 8, 7, 5]),
    ],
)
def test_chunk_passes_in_flight(parallel, count, expected):
    assert [chunks_in_flight(parallel, stage, count) for stage in range(len(expected))] == expected


def test_micro_batches_hold_the_tokens_of_a_mini_step():
    case = recipe_case("qwen2.5-32b")
    count = micro_batches(case)
    tokens = case.workload().trained_tokens / 8
    assert (count - 1) * 4 * 11264 < tokens <= count * 4 * 11264
    interleaved = recipe_case(
        "qwen2.5-32b",
        "parallel.virtual_pipeline_model_parallel_size=2",
        assumptions=Assumptions(response_end=100),
    )
    assert micro_batches(interleaved) % 4 == 0
