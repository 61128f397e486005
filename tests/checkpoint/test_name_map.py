"""The map is correct for every tensor: by shape for published models, by real ranks for small ones."""

import json
from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_fipo.checkpoint.convert.describe import describe_map
from megatron_fipo.checkpoint.convert.name_map import MappedTensor, hf_box, name_map
from megatron_fipo.checkpoint.shard_layouts import map_model, shard
from megatron_fipo.cli.main import main
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.families.family import Layout, Weight
from megatron_fipo.families.registry import find_family
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from tests.checkpoint.test_public_configs import CONFIGS, LAYOUTS, PARAMETERS, read
from tests.checkpoint.test_shard_layouts import architecture
from tests.model.reference import FAMILIES, VOCAB
from tests.ranks import run_ranks

ARCHITECTURES = {
    Qwen2Config: "Qwen2ForCausalLM",
    Qwen3Config: "Qwen3ForCausalLM",
    Qwen3MoeConfig: "Qwen3MoeForCausalLM",
    LlamaConfig: "LlamaForCausalLM",
}


def assert_tiles(tensor: MappedTensor) -> None:
    """The ranks' boxes cover the tensor and do not overlap.

    Each box of a replicated tensor is the complete tensor.
    """
    if tensor.weight.layout is Layout.REPLICATED:
        assert all(box == tuple((0, length) for length in tensor.shape) for box in tensor.boxes)
        return
    assert sum(prod(last - first for first, last in box) for box in tensor.boxes) == prod(tensor.shape)
    cut = 1 if tensor.weight.layout is Layout.ROW else 0
    ends = [0]
    for box in tensor.boxes:
        assert all(box[d] == (0, length) for d, length in enumerate(tensor.shape) if d != cut)
        assert box[cut][0] == ends[-1] <= box[cut][1]
        ends.append(box[cut][1])
    assert ends[-1] == tensor.shape[cut]


@pytest.mark.parametrize(
    ("name", "virtual"),
    [
        (name, virtual)
        for name in PARAMETERS
        for virtual in (None, 2)
        if (name, virtual) != ("qwen3-235b-a22b", 2)
    ],
)
def test_shards_tile_every_tensor_of_published_models(name, virtual):
    family, model = read(name)
    parallel = replace(LAYOUTS[name], virtual_pipeline_model_parallel_size=virtual)
    mapped = name_map(family, model, parallel)
    assert sum(prod(tensor.shape) for tensor in mapped) == PARAMETERS[name]
    assert len({tensor.name for tensor in mapped}) == len(mapped)
    for tensor in mapped:
        of_expert = tensor.weight.expert is not None
        ranks = parallel.expert_tensor_parallel_size if of_expert else parallel.tensor_model_parallel_size
        assert len(tensor.boxes) == ranks
        assert_tiles(tensor)
        assert prod(tensor.shard_shape) == tensor.weight.parameters_per_rank(ranks)
        assert (tensor.expert_rank is not None) == of_expert
    layers = {tensor.weight.layer: tensor.stages for tensor in mapped if tensor.weight.layer is not None}
    assert {len(stages) for stages in layers.values()} == {1}
    counts = Counter((stages[0].pipeline, stages[0].chunk) for stages in layers.values())
    stages = parallel.pipeline_model_parallel_size
    assert counts == {
        (stage, chunk): model.num_layers // (stages * (virtual or 1))
        for stage in range(stages)
        for chunk in range(virtual or 1)
    }


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_s_box_holds_what_its_shard_is_made_of(layout, size):
    model = architecture(groups=4, queries_per_group=2, head=2, vocab=13)
    shapes = {
        Layout.QKV: ((16, 3), (8, 3), (8, 3)),
        Layout.GATE_UP: ((8, 3), (8, 3)),
        Layout.VOCABULARY: ((13, 3),),
        Layout.ROW: ((3, 8),),
        Layout.COLUMN: ((8, 3),),
        Layout.REPLICATED: ((5,),),
    }[layout]
    weight = Weight("w", layout, tuple(map(str, range(len(shapes)))), shapes)
    numbers = iter(range(1, 1000))
    parts = [torch.tensor([next(numbers) for _ in range(prod(shape))]).view(shape) for shape in shapes]
    for rank in range(size):
        boxes = [hf_box(layout, shape, rank, size) for shape in shapes]
        boxed = [
            part[tuple(slice(*edge) for edge in box)].flatten()
            for part, box in zip(parts, boxes, strict=True)
        ]
        found = shard(weight, parts, model, rank, size).flatten()
        assert sorted(torch.cat(boxed).tolist()) == sorted(found[found > 0].tolist())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_hold_what_the_map_says(tmp_path, family, tied):
    """TP 2 x PP 2 x VPP 2 (with experts EP 2): the names and shapes of each rank's parameters."""
    config_class, variant = FAMILIES[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config_class(
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        architectures=[ARCHITECTURES[config_class]],
        max_position_embeddings=64,
        **{**sizes, **variant},
    ).save_pretrained(tmp_path)
    parallel = ParallelConfig(
        2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        expert_model_parallel_size=2 if "moe" in family else 1,
    )

    def body(rank, world):
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(tmp_path, ModelConfig(path=str(tmp_path), dtype="float32"), parallel)
        return [
            {name: tuple(value.shape) for name, value in map_model([chunk]).parameters.items()}
            for chunk in chunks
        ]

    config = json.loads((tmp_path / "config.json").read_text())
    model = find_family(config).translate(config)
    mapped = name_map(find_family(config), model, parallel)
    for rank, chunks in enumerate(run_ranks(4, body)):
        for number, found in enumerate(chunks):
            expected = {
                tensor.weight.megatron: tensor.shard_shape
                for tensor in mapped
                if any((at.pipeline, at.chunk) == (rank // 2, number) for at in tensor.stages)
                and tensor.expert_rank in (None, rank % 2)
            }
            if tied and (rank // 2, number) == (1, 1):
                expected["output_layer.weight"] = expected.pop("embedding.word_embeddings.weight")
            assert found == expected


def test_ranks_hold_the_rows_of_experts_that_the_map_says(tmp_path):
    """Expert-tensor 2 x expert 2 of TP 2 x DP 2: shapes, and the experts of each rank."""
    config_class, variant = FAMILIES["qwen3_moe-mixed"]
    config_class(
        vocab_size=VOCAB,
        architectures=[ARCHITECTURES[config_class]],
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **variant,
    ).save_pretrained(tmp_path)
    parallel = ParallelConfig(
        2,
        sequence_parallel=True,
        data_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    )

    def body(rank, world):
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(tmp_path, ModelConfig(path=str(tmp_path), dtype="float32"), parallel)
        return {name: tuple(value.shape) for name, value in map_model(chunks).parameters.items()}

    config = json.loads((tmp_path / "config.json").read_text())
    mapped = name_map(find_family(config), find_family(config).translate(config), parallel)
    for rank, found in enumerate(run_ranks(4, body)):
        assert found == {
            tensor.weight.megatron: tensor.shard_shape
            for tensor in mapped
            if tensor.expert_rank in (None, rank // 2)
        }


def test_the_dry_run_prints_every_tensor_and_needs_config_json_only(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen2.5-32b.json").read_bytes())
    flags = ["--tensor-parallel", "8", "--pipeline-parallel", "4"]
    assert main(["convert", "to-megatron", str(tmp_path), "--dry-run", *flags]) == 0
    printed = capsys.readouterr().out
    family, model = read("qwen2.5-32b")
    for weight in family.weights(model):
        assert all(f"\n{name} " in printed for name in weight.names)
    assert "32,763,876,352 parameters" in printed
    assert "columns 0:640 640:1280" in printed
    assert "133504:152064" in printed
    assert "pipeline stage 3 (ranks 24-31): 1,073,007,616 parameters on each rank" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_dry_run_prints_the_experts_of_a_layer_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen3-30b-a3b.json").read_bytes())
    flags = ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--expert-parallel", "8"]
    assert main(["convert", "to-megatron", str(tmp_path), "--dry-run", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "30,532,122,624 parameters in 18867 tensors" in lines[0]
    assert lines[0].endswith("tensor 2 x pipeline 2 x data 4 = 16 ranks; experts: expert tensor 1 x expert 8")
    assert len(lines) < 48 * 12 + 20
    (experts,) = (
        line for line in lines if line.startswith("model.layers.47.mlp.experts.{0-127}.up_proj.weight")
    )
    assert "decoder.layers.47.mlp.experts.local_experts.{0-127}.linear_fc1.weight" in experts
    assert experts.endswith("experts 0:16 16:32 32:48 48:64 64:80 80:96 96:112 112:128; all")
    assert lines[-1].startswith("pipeline stage 1 (ranks 8-15): ")
    assert sum(int(line.split()[-5].replace(",", "")) for line in lines[-2:]) == per_rank_of_30b()


def per_rank_of_30b() -> int:
    """Of both stages: 1/8 of the experts, 1/2 of attention and vocabulary, all norms and routers."""
    experts = 48 * 128 * 3 * 768 * 2048 // 8
    halves = (48 * (2 * 4096 + 2 * 512) * 2048 + 2 * 152064 * 2048) // 2
    return experts + halves + 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tensor-parallel", "3"], "does not divide the model's 40 attention heads"),
        (["--pipeline-parallel", "5"], "=5 does not divide the model's 64 layers"),
        (["--expert-parallel", "2"], "expert_model_parallel_size=2 needs a model with experts"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(tmp_path, capsys, flags, reason):
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen2.5-32b.json").read_bytes())
    assert main(["convert", "to-megatron", str(tmp_path), "--dry-run", *flags]) == 2
    output = capsys.readouterr()
    assert reason in output.err
    assert not output.out


def test_virtual_chunks_show_as_stage_and_chunk():
    family, model = read("llama-3.1-70b")
    parallel = ParallelConfig(8, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    lines = [line.split() for line in describe_map(family, model, parallel)]
    stage = {line[0]: line[5] for line in lines if line and line[0].endswith("down_proj.weight")}
    assert [stage[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (0, 10, 39, 40, 79)] == [
        "0.0",
        "1.0",
        "3.0",
        "0.1",
        "3.1",
    ]
