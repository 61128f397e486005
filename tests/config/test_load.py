import math
from dataclasses import fields, is_dataclass

import pytest

from megatron_fipo.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    SftConfig,
    differences,
    load_config,
    save_config,
)
from megatron_fipo.config.describe import describe
from megatron_fipo.config.load import leaves
from megatron_fipo.errors import UserError
from megatron_fipo.fields import field_docs

REQUIRED = ["model.path=m", "run_dir=r"]


def schemas(root: type) -> list[type]:
    sections = [item.type for item in fields(root) if isinstance(item.type, type) and is_dataclass(item.type)]
    return [root, *(schema for section in sections for schema in schemas(section))]


class TestSchema:
    @pytest.mark.parametrize(
        "schema", {*schemas(Config), *schemas(SftConfig)}, ids=lambda schema: schema.__name__
    )
    def test_every_setting_says_what_it_means(self, schema):
        settings = {item.name for item in fields(schema) if not is_dataclass(item.type)}
        assert settings <= field_docs(schema).keys()
        assert schema.__doc__
        assert not schema.__doc__.startswith(f"{schema.__name__}(")  # the one that @dataclass writes

    @pytest.mark.parametrize("schema", [Config, SftConfig])
    def test_the_description_is_a_file_with_the_defaults(self, schema, tmp_path):
        text = describe(schema)
        (tmp_path / "all.yaml").write_text(text, encoding="utf-8")
        needed = REQUIRED if schema is Config else ["model_config_path=m", "output_dir=o"]
        assert load_config(tmp_path / "all.yaml", needed, schema) == load_config(None, needed, schema)
        assert all(f"{key.rpartition('.')[2]}: " in text for key, _ in leaves(schema))

    @pytest.mark.parametrize(
        ("cp", "tp", "sequence_parallel", "multiple"),
        [
            (1, 1, False, 1),
            (1, 4, False, 1),
            (1, 4, True, 4),
            (2, 1, False, 4),
            (2, 2, True, 4),
            (2, 3, True, 12),
            (4, 8, True, 32),
        ],
    )
    def test_sequences_split_into_chunks_and_over_sequence_parallel_ranks(
        self, cp, tp, sequence_parallel, multiple
    ):
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sequence_parallel
        )
        assert parallel.length_multiple == multiple
        assert multiple % (2 * cp if cp > 1 else 1) == 0
        assert not sequence_parallel or (multiple // cp) % tp == 0

    @pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed"])
    @pytest.mark.parametrize(
        ("cp", "tp", "sequence_parallel"),
        [(1, 1, False), (1, 4, True), (2, 3, True), (4, 8, True), (2, 8, False)],
    )
    def test_fp8_gives_each_rank_whole_blocks_of_tokens(self, cp, tp, sequence_parallel, recipe):
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sequence_parallel
        )
        assert (
            parallel.pack_multiple(ModelConfig(fp8_recipe=recipe).token_multiple) == parallel.length_multiple
        )
        multiple = parallel.pack_multiple(ModelConfig(fp8="hybrid", fp8_recipe=recipe).token_multiple)
        assert multiple == cp * (tp if sequence_parallel else 1) * (128 if recipe == "blockwise" else 16)
        assert multiple % parallel.length_multiple == 0


class TestLoad:
    def test_overrides_win_in_order_and_give_plain_instances(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text("model: {path: here}\nrun_dir: here/run\noptimizer: {lr: 1e-5}\n", encoding="utf-8")
        overrides = [
            "optimizer.lr=2e-5",
            "optimizer.lr=3e-5",
            "objective.influence_clip=[0.8,1.2]",
            "objective.half_life=.inf",
        ]
        config = load_config(path, overrides)
        assert type(config) is Config
        assert type(config.model) is ModelConfig
        assert config.run_dir == "here/run"
        assert config.optimizer.lr == 3e-5
        assert config.objective.influence_clip == (0.8, 1.2)
        assert math.isinf(config.objective.half_life)
        assert load_config(path, ["objective.influence_clip=null"]).objective.influence_clip is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("objective.halflife=3", "unknown key 'objective.halflife'; did you mean 'objective.half_life'?"),
            ("lr=3", "did you mean 'optimizer.lr'?"),
            ("tensor_model_parallel=2", "did you mean 'parallel.tensor_model_parallel_size'?"),
            ("optimiser.weight=3", "unknown key 'optimiser'; did you mean 'optimizer'?"),
            ("batch.qqq=3", "keys here are: batch.prompts_per_iteration"),
            ("optimizer.lr=fast", "override 'optimizer.lr=fast': optimizer.lr must be a number, not 'fast'"),
            ("iterations=1.5", "iterations must be an integer, not '1.5'"),
            ("model=path", "'model' is a section and must have keys such as model.path"),
            (
                "objective.name=fippo",
                "objective.name must be one of fipo, dapo, grpo, not 'fippo' (did you mean 'fipo'?)",
            ),
            ("iterations", "must look like section.key=value"),
            ("=3", "must look like section.key=value"),
            ("objective.influence_clip=[1", "not valid YAML"),
            ("objective.influence_clip=[a,b]", "objective.influence_clip must be a number, not 'a'"),
            ("objective.influence_clip={a: 1}", "override 'objective.influence_clip={a: 1}'"),
            ("model={pth: x}", "unknown key 'model.pth'"),
            ("model=[path]", "'model' is a section and must have keys such as model.path"),
            ("seed.x=1", "seed must be an integer, not a section"),
            ("run_dir=", "run_dir must be text, not null"),
            ("run_dir=???", "no value for run_dir"),
            ("objective.influence_clip=???", "influence_clip must be a list of 2 values"),
            (
                "tracking.wandb_project=???",
                "wandb_project must be text; ??? marks a value that is still to be given",
            ),
            ("max_walltime_minutes=???", "max_walltime_minutes must be a number or null"),
            ("iterations=???", "iterations must be an integer"),
            ("deterministic=???", "deterministic must be true or false"),
            ("run_dir=${model.path}/x", "run_dir must not refer to other values as '${model.path}/x' does"),
        ],
    )
    def test_a_wrong_override_is_named(self, override, message):
        with pytest.raises(UserError) as error:
            load_config(None, [*REQUIRED, override])
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "objective: {half_lif: 3}",
                "c.yaml, line 1: unknown key 'objective.half_lif'; did you mean 'objective.half_life'?",
            ),
            ("objective:\n", "'objective' is a section"),
            ("a: b: c", "c.yaml, line 1 is not valid YAML"),
            ("seed: 1\nseed: 2", "c.yaml, line 2"),
            ("- 1", "must be a mapping"),
            ("model: {path: m}\nseed: x", "c.yaml, line 2: seed must be an integer, not 'x'"),
            ("seed: 2", "no value for model.path, run_dir"),
            ("", "no value for model.path, run_dir"),
        ],
    )
    def test_a_wrong_file_is_named(self, text, message, tmp_path):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as error:
            load_config(tmp_path / "c.yaml", [])
        assert message in str(error.value)

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(UserError, match="no configuration file"):
            load_config(tmp_path / "absent.yaml", [])
        with pytest.raises(UserError, match="cannot read"):
            load_config(tmp_path, [])
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(UserError, match=r"binary\.yaml"):
            load_config(tmp_path / "binary.yaml", [])

    def test_a_saved_configuration_reads_back_equal(self, tmp_path):
        config = load_config(
            None,
            [*REQUIRED, "objective.half_life=.inf", "objective.influence_clip=null", "optimizer.lr=1e-7"],
        )
        save_config(config, tmp_path / "deep" / "config.yaml")
        assert load_config(tmp_path / "deep" / "config.yaml", []) == config
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]

    def test_a_configuration_that_cannot_be_saved_leaves_nothing(self, tmp_path):
        (tmp_path / "config.yaml").mkdir()
        with pytest.raises(UserError, match="cannot write"):
            save_config(load_config(None, REQUIRED), tmp_path / "config.yaml")
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

    def test_differences_name_the_keys(self):
        a = load_config(None, REQUIRED)
        b = load_config(None, [*REQUIRED, "seed=2", "objective.influence_clip=null", "optimizer.lr=1e-6"])
        assert differences(a, b) == ["objective.influence_clip", "seed"]
        assert differences(a, a) == []
        with pytest.raises(ValueError, match="cannot compare"):
            differences(a, SftConfig())
