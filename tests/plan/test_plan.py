import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_fipo.checkpoint.shard_layouts import shard
from megatron_fipo.cli.case_options import read_case
from megatron_fipo.config import Config, ModelConfig, ParallelConfig, load_config, validate
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import (
    EMBEDDING_WEIGHT,
    OUTPUT_WEIGHT,
    Architecture,
    Family,
    HfTensor,
    Layout,
    Rule,
    Weight,
    padded_vocab_size,
)
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.families.registry import read_architecture, read_model_config
from megatron_fipo.model import parallel as process_groups
from megatron_fipo.model.build import build_model
from megatron_fipo.plan.case import case_of
from megatron_fipo.plan.fit import fullest_stage
from megatron_fipo.plan.layout import rank_groups
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.plan import Plan, make_plan, make_times
from megatron_fipo.plan.render import print_plan
from megatron_fipo.plan.workload import Assumptions
from tests.plan.cases import recipe_case
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [
    EXAMPLES / name for name in ("countdown/fipo", "countdown/fipo-async", "countdown/dapo", "countdown/grpo")
]
RECIPES += [EXAMPLES / "countdown-tool/calculator", EXAMPLES / "countdown-moe/fipo"]
RECIPES += [
    EXAMPLES / folder / name
    for folder in ("countdown-4", "method_choice", "smollm-math")
    for name in ("fipo", "dapo", "grpo")
]
RECIPES += [EXAMPLES / "qwen2.5-32b" / name for name in ("fipo", "dapo", "grpo", "fipo-32gpu")]
RECIPES += [EXAMPLES / "qwen2.5-7b-math" / name for name in ("fipo", "dapo", "grpo", "fipo-8gpu")]
RECIPES += [EXAMPLES / "qwen3-30b-a3b" / name for name in ("fipo", "dapo")]


def load_recipe(name: str, *overrides: str) -> Config:
    """A shipped recipe; the sizes of a small model are read from the folder that its base model was
    made from.
    """
    config = load_config(EXAMPLES / f"{name}.yaml", list(overrides))
    folder = EXAMPLES / Path(name).parent
    if folder.name in {"countdown-4", "countdown-tool", "method_choice"}:
        folder = EXAMPLES / "countdown"
    made = folder / "model-config"
    config.model.path = str(made if made.is_dir() else folder)
    return config


def plan_of(config: Config, family: Family, architecture: Architecture) -> Plan:
    return make_plan(case_of(config, family, architecture, load_machine("h100-80gb"), Assumptions()))


def printed(config: Config) -> str:
    """What the dry run prints, on 80 columns."""
    validate(config, read_architecture(config.model.path))
    output = StringIO()
    plan = make_plan(read_case(config))
    print_plan(plan, make_times(plan.case), Console(file=output, width=80))
    return output.getvalue()


class TestShippedRecipes:
    def test_none_is_forgotten(self):
        shipped = {
            path.with_suffix("") for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "studies"
        }
        folders = ("countdown", "countdown-4", "countdown-moe", "method_choice", "smollm-math")
        assert shipped == {*RECIPES, *(EXAMPLES / folder / "sft" for folder in folders)}

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
    def test_loads_validates_and_dry_runs(self, recipe):
        config = load_recipe(str(recipe.relative_to(EXAMPLES)))
        text = printed(config)
        assert f"Ranks: {config.parallel.world_size} = " in text
        assert "…" not in text
        assert f"{config.rollout.num_engines} {config.rollout.engine} engine" in text

    def test_32b(self):
        plan = make_plan(recipe_case("qwen2.5-32b"))
        assert plan.parameters == 32_763_876_352
        assert len(plan.groups) * 8 == 128
        assert plan.work.mini_steps == 8
        assert plan.work.tokens_per_mini_step == 64 * 16 * (2048 + 20480)
        assert plan.work.micro_batches == 64 * 16 // 2
        # 2 bytes of weight, 4 of gradient, 12 of optimizer state over 4 context-parallel ranks
        assert [stage.total_bytes for stage in plan.stages] == [stage.parameters * 9 for stage in plan.stages]

    @pytest.mark.parametrize(
        "folder", ["qwen2.5-32b", "qwen2.5-7b-math", "qwen3-30b-a3b", "countdown/model-config"]
    )
    def test_the_parameter_count_is_that_of_transformers(self, folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EXAMPLES / folder))
        family, architecture = read_model_config(EXAMPLES / folder)
        assert family.parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())

    def test_the_published_7b_model_is_refused_until_its_positions_are_raised(self, tmp_path):
        values = json.loads((EXAMPLES / "qwen2.5-7b-math/config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(
            json.dumps(values | {"max_position_embeddings": 4096}), encoding="utf-8"
        )
        config = load_recipe("qwen2.5-7b-math/fipo")
        with pytest.raises(Exception, match="12288 tokens exceed the model's max_position_embeddings=4096"):
            validate(config, read_architecture(tmp_path))


def test_a_small_model_is_counted_in_millions():
    text = " ".join(printed(load_recipe("countdown/fipo")).split())
    assert "(0.60M)" in text
    assert "B)" not in text


class TestExperts:
    def text(self, *overrides: str) -> str:
        return " ".join(printed(load_recipe("qwen3-30b-a3b/fipo", *overrides)).split())

    def test_a_plan_shows_the_experts_and_what_a_token_uses(self):
        text = self.text()
        assert "30,532,122,624 (30.53B, 3.35B per token), bfloat16" in text
        assert "128 of width 768 in 48 layers, 8 per token" in text
        assert "expert parallel 8 ranks of 16 experts x data 1" in text
        assert "feed-forward" not in text
        assert "expert load 1.2" in text
        assert "products of experts" in text

    def test_experts_on_several_tensor_ranks_are_not_calibrated(self):
        shared = "parallel.expert_model_parallel_size=4", "parallel.expert_tensor_parallel_size=2"
        text = self.text(*shared)
        assert "expert parallel 4 ranks of 32 experts x tensor 2 x data 1" in text
        assert "experts on several tensor ranks" in text

    def test_layers_without_experts_are_shown(self, tmp_path):
        values = json.loads((EXAMPLES / "qwen3-30b-a3b/config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(json.dumps(values | {"mlp_only_layers": [0, 47]}), "utf-8")
        config = load_recipe("qwen3-30b-a3b/fipo")
        config.model.path = str(tmp_path)
        text = " ".join(printed(config).split())
        assert "key-value groups, feed-forward 6144 in 2 of them" in text
        assert "128 of width 768 in 46 layers, 8 per token" in text

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            (
                ("parallel.expert_model_parallel_size=16",),
                "expert_model_parallel_size=16 x expert_tensor_parallel_size=1 does not divide the 8 ranks",
            ),
            (
                ("parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2"),
                "with experts needs parallel.sequence_parallel=true",
            ),
        ],
    )
    def test_a_layout_that_cannot_run_is_refused(self, overrides, reason):
        with pytest.raises(UserError, match=reason):
            self.text(*overrides)

    def test_a_fuller_rank_needs_more_memory_and_time(self):
        even, uneven = (
            recipe_case("qwen3-30b-a3b", assumptions=Assumptions(expert_load=load)) for load in (1, 3)
        )
        assert fullest_stage(uneven)[1].total.value > fullest_stage(even)[1].total.value
        assert make_times(uneven).iteration.update.total.value > make_times(even).iteration.update.total.value

    def test_a_dense_plan_says_nothing_of_experts(self):
        assert "expert" not in printed(load_recipe("qwen2.5-32b/fipo"))


def _real_rank(
    rank: int, world_size: int, folder: str, parallel: ParallelConfig
) -> tuple[int, tuple[int, int, int]]:
    from megatron.core import parallel_state

    process_groups.initialize(parallel, seed=1)
    chunks = build_model(Path(folder), ModelConfig(path=folder, dtype="float32"), parallel)
    coordinate = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=False),
        parallel_state.get_context_parallel_rank(),
    )
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()), coordinate


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        ParallelConfig(context_parallel_size=2, data_parallel_size=2),
    ],
    ids=["one", "tp2 pp2", "pp2 vpp2", "cp2 dp2"],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_each_rank_holds_what_the_plan_says(parallel, tied, tmp_path):
    values = json.loads((EXAMPLES / "countdown/model-config/config.json").read_text(encoding="utf-8"))
    values |= {"tie_word_embeddings": tied, "vocab_size": 1030}  # not a multiple of anything
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = load_recipe("countdown/fipo")
    config.parallel = parallel
    plan = plan_of(config, *read_model_config(tmp_path))

    groups = {rank: group for group in plan.groups for rank in range(group.first_rank, group.last_rank + 1)}
    assert sorted(groups) == list(range(parallel.world_size))
    for rank, (parameters, coordinate) in enumerate(
        run_ranks(parallel.world_size, _real_rank, str(tmp_path), parallel)
    ):
        group = groups[rank]
        assert coordinate == (group.pipeline, group.data, group.context)
        assert parameters == plan.stages[group.pipeline].parameters


def test_a_new_family_is_counted_by_its_table_alone():
    """Norms of heads, a bias that is not sharded and a plain column layout, none of which Qwen2 has."""
    layer = "decoder.layers.{layer}"
    rules = (
        Rule(EMBEDDING_WEIGHT, Layout.VOCABULARY, (HfTensor("e", ("vocab", "hidden")),)),
        Rule(
            f"{layer}.self_attention.q_layernorm.weight",
            Layout.REPLICATED,
            (HfTensor("{layer}.n", ("head",)),),
        ),
        Rule(f"{layer}.mlp.linear_fc1.weight", Layout.COLUMN, (HfTensor("{layer}.up", ("ffn", "hidden")),)),
        Rule(f"{layer}.mlp.linear_fc2.bias", Layout.REPLICATED, (HfTensor("{layer}.b", ("hidden",)),)),
        Rule(OUTPUT_WEIGHT, Layout.VOCABULARY, (HfTensor("o", ("vocab", "hidden")),)),
    )
    hidden, ffn, head, vocab = 24, 48, 6, 33
    architecture = Architecture(
        4, hidden, ffn, 4, 4, head, vocab, 512, 1e-6, 1e4, share_embeddings_and_output_weights=False
    )
    family = Family("other", ("OtherForCausalLM",), lambda config: architecture, rules)
    config = load_recipe(
        "countdown/fipo", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
    )
    plan = plan_of(config, family, architecture)
    assert plan.parameters == 2 * vocab * hidden + 4 * (head + ffn * hidden + hidden)
    on_each_stage = 17 * hidden + 2 * (head + ffn // 2 * hidden + hidden)
    assert [stage.parameters for stage in plan.stages] == [on_each_stage, on_each_stage]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_holds_of_each_weight_what_the_conversion_gives_it(size):
    architecture = Architecture(1, 24, 48, 8, 4, 6, 1030, 512, 1e-6, 1e4, False)
    weights = [*QWEN2.weights(architecture), Weight("column", Layout.COLUMN, ("c",), ((8, 3),))]
    assert {weight.layout for weight in weights} == set(Layout)
    for weight in weights:
        of_rank = shard(weight, [torch.zeros(shape) for shape in weight.shapes], architecture, size - 1, size)
        assert weight.parameters_per_rank(size) == of_rank.numel()


def test_a_weight_that_does_not_split_is_an_error():
    with pytest.raises(ValueError, match="the 9 parameters of odd do not divide over 2"):
        Weight("odd", Layout.COLUMN, ("odd",), ((3, 3),)).parameters_per_rank(2)


class TestWork:
    def test_micro_batches_round_up(self):
        # The longest sequence has 176 tokens, so a micro-batch of 300 fits one, and 6 x 16 = 96 responses over
        # 5 ranks need 20 micro-batches.
        config = load_recipe(
            "countdown/fipo", "batch.max_tokens_per_micro_batch=300", "parallel.data_parallel_size=5"
        )
        work = plan_of(config, *read_model_config(config.model.path)).work
        assert (work.longest_sequence, work.mini_steps, work.micro_batches) == (176, 4, 20)

    def test_state_of_the_optimizer_is_shared_only_if_distributed(self):
        def optimizer_bytes(*overrides):
            config = load_recipe("countdown/fipo", "parallel.data_parallel_size=2", *overrides)
            stage = plan_of(config, *read_model_config(config.model.path)).stages[0]
            return stage.optimizer_bytes / stage.parameters

        assert optimizer_bytes() == 4
        assert optimizer_bytes("optimizer.distributed=false") == 8
        assert optimizer_bytes("optimizer.distributed=false", "model.dtype=bfloat16") == 12


class TestMemory:
    def stage(self, *overrides, index=1):
        """A stage of the 32B recipe; the one in the middle has layers only."""
        return make_plan(recipe_case("qwen2.5-32b", *overrides)).stages[index]

    def test_state_in_bfloat16(self):
        """Two moments of 2 bytes and a master weight of 4, over 4 context-parallel ranks."""
        stage = self.stage("optimizer.state_dtype=bfloat16")
        assert stage.optimizer_bytes == stage.parameters * 8 // 4

    @pytest.mark.parametrize("share", [0.25, 1.0])
    def test_offloaded_state_and_its_gradients_are_in_host_memory(self, share):
        stage = self.stage(f"optimizer.cpu_offload={share}")
        assert stage.optimizer_bytes == stage.parameters * 12 * (1 - share) // 4
        assert stage.host_bytes == stage.parameters * 16 * share // 4
        assert "offloaded optimizer" in printed(
            load_recipe("qwen2.5-32b/fipo", f"optimizer.cpu_offload={share}")
        )

    def test_nothing_is_said_of_offloading_without_it(self):
        assert self.stage().host_bytes == 0
        assert "offloaded" not in printed(load_recipe("qwen2.5-32b/fipo"))

    def test_fp8_copies_the_layers_matrices_or_takes_their_place(self):
        plain, copies = self.stage(), self.stage("model.fp8=hybrid")
        instead = self.stage("model.fp8=hybrid", "model.fp8_param_gather=true")
        architecture = read_architecture(EXAMPLES / "qwen2.5-32b")
        hidden, ffn = architecture.size("hidden"), architecture.size("ffn")
        query, key = architecture.size("query"), architecture.size("key")
        matrices = 16 * (hidden * (query + 2 * key) + query * hidden + 3 * hidden * ffn) // 8
        assert copies.weight_bytes - plain.weight_bytes == 2 * matrices
        assert instead.weight_bytes == plain.weight_bytes  # the FP8 matrix and its transpose, a byte each
        assert matrices < plain.parameters < 1.001 * matrices  # the rest are norms and biases

    def test_fp8_is_shown_and_its_blocks_fit_the_budget(self):
        config = load_recipe("qwen2.5-32b/fipo", "model.fp8=hybrid", "model.fp8_param_gather=true")
        text = " ".join(printed(config).split())
        assert "bfloat16, products and layer weights in FP8 (hybrid, blockwise)" in text

    def test_a_micro_batch_has_complete_fp8_blocks_on_every_rank(self):
        """A block of 128 tokens on each of 8 sequence-parallel and 4 context-parallel ranks makes 4,096."""
        case = recipe_case("qwen2.5-32b", "model.fp8=hybrid")
        assert make_plan(case).work.micro_batch_tokens == 11 * 4096 == 4 * 11264
        case = recipe_case("qwen2.5-32b", "model.fp8=hybrid", "batch.max_tokens_per_micro_batch=12000")
        assert make_plan(case).work.micro_batch_tokens == 11 * 4096


def test_padded_vocab_size():
    assert padded_vocab_size(32, 1) == 32
    assert padded_vocab_size(33, 2) == 34
    assert padded_vocab_size(1024, 3) == 1026
    assert padded_vocab_size(1025, 1) == 1152
    assert padded_vocab_size(152_064, 4) == 152_064
    assert padded_vocab_size(152_064, 8) == 152_576


def test_rank_groups_cover_every_coordinate_once():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        context_parallel_size=3,
        data_parallel_size=2,
        pipeline_model_parallel_size=4,
    )
    groups = rank_groups(parallel)
    assert len({(group.pipeline, group.data, group.context) for group in groups}) == 24
    assert all(group.last_rank - group.first_rank == 1 for group in groups)
