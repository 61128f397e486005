import json
import math
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Optional

import pytest

from megatron_fipo.config import (
    Config,
    Machine,
    ModelConfig,
    ParallelConfig,
    SftConfig,
    differences,
    load_config,
    save_config,
    validate,
    validate_evaluation,
    validate_sft,
)
from megatron_fipo.config import validate as validate_function
from megatron_fipo.config.describe import describe, field_docs
from megatron_fipo.config.load import leaves
from megatron_fipo.config.precision import Accelerators
from megatron_fipo.errors import UserError
from megatron_fipo.model.families import read_architecture
from megatron_fipo.model.family import Architecture

REQUIRED = ["model.path=m", "run_dir=r"]
ARCHITECTURE = Architecture(
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=24,
    vocab_size=32,
    max_position_embeddings=512,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    share_embeddings_and_output_weights=True,
    add_qkv_bias=True,
)
VALID = [*REQUIRED, "data.source=countdown", "reward.name=countdown"]
VALID += ["rollout.max_prompt_length=16", "rollout.max_response_length=128", "reward.overlong_buffer=32"]
H100 = Accelerators(capability=(9, 0), cuda="13.0", transformer_engine="2.9.0")
FP8_WEIGHTS = "model.fp8=hybrid model.fp8_param_gather=true"


def schemas(root: type) -> list[type]:
    sections = [item.type for item in fields(root) if isinstance(item.type, type) and is_dataclass(item.type)]
    return [root, *(schema for section in sections for schema in schemas(section))]


class TestSchema:
    @pytest.mark.parametrize("schema", {*schemas(Config), *schemas(SftConfig)}, ids=lambda schema: schema.__name__)
    def test_every_setting_says_what_it_means(self, schema):
        settings = {item.name for item in fields(schema) if not is_dataclass(item.type)}
        assert settings <= field_docs(schema).keys()
        assert schema.__doc__
        assert not schema.__doc__.startswith(f"{schema.__name__}(")  # the one that @dataclass writes

    @pytest.mark.parametrize("schema", [Config, SftConfig])
    def test_the_description_is_a_file_with_the_defaults(self, schema, tmp_path):
        (tmp_path / "all.yaml").write_text(describe(schema), encoding="utf-8")
        needed = REQUIRED if schema is Config else ["model_config_path=m", "output_dir=o"]
        assert load_config(tmp_path / "all.yaml", needed, schema) == load_config(None, needed, schema)
        assert all(f"{key.rpartition('.')[2]}: " in describe(schema) for key, _ in leaves(schema))

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
    def test_sequences_split_into_chunks_and_over_sequence_parallel_ranks(self, cp, tp, sequence_parallel, multiple):
        parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sequence_parallel)
        assert parallel.length_multiple == multiple
        assert multiple % (2 * cp if cp > 1 else 1) == 0
        assert not sequence_parallel or (multiple // cp) % tp == 0

    @pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed"])
    @pytest.mark.parametrize(
        ("cp", "tp", "sequence_parallel"), [(1, 1, False), (1, 4, True), (2, 3, True), (4, 8, True), (2, 8, False)]
    )
    def test_fp8_gives_each_rank_whole_blocks_of_tokens(self, cp, tp, sequence_parallel, recipe):
        parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sequence_parallel)
        assert parallel.pack_multiple(ModelConfig(fp8_recipe=recipe).token_multiple) == parallel.length_multiple
        multiple = parallel.pack_multiple(ModelConfig(fp8="hybrid", fp8_recipe=recipe).token_multiple)
        assert multiple == cp * (tp if sequence_parallel else 1) * (128 if recipe == "blockwise" else 16)
        assert multiple % parallel.length_multiple == 0


class TestLoad:
    def test_overrides_win_in_order_and_give_plain_instances(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text("model: {path: here}\nrun_dir: ${model.path}/run\noptimizer: {lr: 1e-5}\n", encoding="utf-8")
        overrides = ["optimizer.lr=2e-5", "optimizer.lr=3e-5", "objective.influence_clip=[0.8,1.2]", "objective.half_life=.inf"]
        config = load_config(path, overrides)
        assert type(config) is Config
        assert type(config.model) is ModelConfig
        assert config.run_dir == "here/run"
        assert config.optimizer.lr == 3e-5
        assert config.objective.influence_clip == [0.8, 1.2]
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
            ("optimizer.lr=fast", "optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
            ("iterations=1.5", "could not be converted to Integer"),
            ("model=path", "'model' is a section and has to hold keys such as model.path"),
            ("objective.name=fippo", "objective.name is 'fippo', but has to be one of: fipo, dapo, grpo (did you mean 'fipo'?)"),
            ("iterations", "has to look like section.key=value"),
            ("=3", "has to look like section.key=value"),
            ("objective.influence_clip=[1", "not valid YAML"),
            ("run_dir=${nowhere}", "nowhere"),
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
            ("objective: {half_lif: 3}", "c.yaml: unknown key 'objective.half_lif'; did you mean 'objective.half_life'?"),
            ("objective:\n", "'objective' is a section"),
            ("a: b: c", "c.yaml, line 1 is not valid YAML"),
            ("seed: 1\nseed: 2", "c.yaml, line 2"),
            ("- 1", "has to be a mapping"),
            ("seed: x", "c.yaml: seed: Value 'x'"),
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
        config = load_config(None, [*REQUIRED, "objective.half_life=.inf", "objective.influence_clip=null", "optimizer.lr=1e-7"])
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


class TestValidate:
    def test_the_base_of_these_tests_is_valid(self):
        validate(load_config(None, VALID), ARCHITECTURE, Machine(cpus=2, gpus=0))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("parallel.tensor_model_parallel_size=3", "does not divide the model's 4 attention heads"),
            ("parallel.tensor_model_parallel_size=4", "does not divide the model's 2 key-value groups; choose a divisor of 2"),
            ("parallel.pipeline_model_parallel_size=3", "does not divide the model's 4 layers"),
            (
                "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=3",
                "does not divide the model's 4 layers",
            ),
            ("parallel.virtual_pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size"),
            ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size above 1"),
            ("parallel.context_parallel_size=0", "parallel.context_parallel_size has to be at least 1, not 0"),
            (
                "parallel.data_parallel_size=3",
                "need 3 ranks (tensor 1 x pipeline 1 x context 1 x data 3), but there are 2 CPU cores",
            ),
            ("parallel.overlap_communication=true optimizer.distributed=false", "needs optimizer.distributed=true"),
            ("model.layer_spec=transformer_engine", "needs a GPU"),
            ("batch.mini_batch_prompts=60", "has to divide"),
            ("batch.responses_per_prompt=1", "at least 2"),
            ("batch.max_tokens_per_micro_batch=143", "raise it to at least 144"),
            ("batch.max_tokens_per_micro_batch=71 parallel.context_parallel_size=2", "raise it to at least 72"),
            ("rollout.max_prompts=10", "can never give"),
            ("rollout.engine_tensor_parallel_size=2", "needs rollout.engine=vllm"),
            ("rollout.engine=vllm rollout.engine_tensor_parallel_size=3", "does not divide the model's"),
            ("rollout.placement=colocated", "needs rollout.engine=vllm"),
            ("rollout.engine=vllm rollout.placement=colocated rollout.mode=one_step_off", "needs rollout.mode=synchronous"),
            ("rollout.engine=vllm rollout.placement=colocated rollout.num_engines=2", "do not fit"),
            ("rollout.mode=one_step_off rollout.max_staleness=0", "raise rollout.max_staleness"),
            ("deterministic=true rollout.mode=fully_asynchronous rollout.unfinished=continue", "deterministic=true needs"),
            ("deterministic=true rollout.unfinished=continue", "deterministic=true needs"),
            ("rollout.mode=fully_asynchronous", "needs rollout.unfinished=continue"),
            ("rollout.unfinished=continue rollout.max_staleness=0", "needs rollout.max_staleness of at least 1"),
            ("rollout.mode=one_step_off rollout.unfinished=continue", "needs rollout.max_staleness of at least 2"),
            ("objective.correction=mis rollout.top_p=0.9", "compares whole distributions"),
            ("checkpoint.keep_last=0", "checkpoint.keep_last has to be at least 1"),
            ("max_walltime_minutes=0", "max_walltime_minutes has to be above 0"),
            ("objective.correction_cap=0", "objective.correction_cap has to be above 0"),
            ("rollout.max_staleness=-1", "rollout.max_staleness has to be at least 0"),
            ("rollout.weight_bucket_mb=0", "rollout.weight_bucket_mb has to be at least 1, not 0"),
            ("rollout.temperature=0", "rollout.temperature has to be above 0"),
            ("rollout.top_p=1.1", "rollout.top_p has to be above 0 and at most 1"),
            ("rollout.max_response_length=500", "516 tokens exceed the model's max_position_embeddings=512"),
            ("objective.half_life=0", "objective.half_life has to be above 0"),
            ("objective.half_life=.nan", "objective.half_life has to be above 0"),
            ("objective.influence_clip=[1.2,1.0]", "two rising numbers"),
            ("objective.influence_clip=[1.0]", "two rising numbers"),
            ("objective.dual_clip=1.2", "has to be above 1 + objective.clip_high = 1.28"),
            ("objective.clip_low=1.0", "objective.clip_low has to be at least 0 and below 1"),
            ("objective.kl_coefficient=0.1", "is for grpo only"),
            ("objective.name=grpo objective.normalization=reference_micro_batch", "is not for grpo"),
            ("objective.name=grpo objective.clip_low=0.5 objective.dual_clip=1.4", "1 + objective.clip_low = 1.5"),
            ("optimizer.lr=.inf", "optimizer.lr has to be finite"),
            ("optimizer.lr=0", "optimizer.lr has to be above 0"),
            ("reward.overlong_buffer=128", "has to be below rollout.max_response_length=128"),
            ("reward.name=dapo_math", "needs reward.name=countdown"),
            ("data.source=jsonl reward.name=dapo_math", "needs data.train_path"),
            ("data.source=jsonl reward.name=dapo_math data.train_path=t", "needs data.evaluation_path"),
            ("data.source=jsonl reward.name=dapo_math data.train_path=t evaluation.every=0", "evaluation.before_training=false"),
            (
                "data.source=jsonl reward.name=dapo_math data.train_path=t evaluation.before_training=false",
                "evaluation.every=0 and",
            ),
            ("iterations=0", "iterations has to be at least 1"),
        ],
    )
    def test_impossible_combinations_are_refused(self, overrides, message):
        with pytest.raises(UserError) as error:
            validate(load_config(None, [*VALID, *overrides.split()]), ARCHITECTURE, Machine(cpus=2, gpus=0))
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "overrides",
        [
            "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
            "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.context_parallel_size=2 batch.max_tokens_per_micro_batch=72",
            "parallel.data_parallel_size=2",
            "objective.name=grpo objective.kl_coefficient=0.1",
            "objective.half_life=.inf objective.influence_clip=null",
            "data.source=jsonl reward.name=dapo_math data.train_path=t evaluation.every=0 evaluation.before_training=false",
            "objective.name=grpo objective.clip_high=2.0 objective.dual_clip=1.5",
            "objective.name=dapo objective.normalization=reference_micro_batch",
            "rollout.num_engines=64",
            "rollout.engine=vllm rollout.placement=colocated",
            "rollout.mode=fully_asynchronous rollout.unfinished=continue objective.correction=tis",
            "deterministic=true rollout.mode=one_step_off",
            "batch.max_tokens_per_micro_batch=144",
            "rollout.max_response_length=496",
        ],
    )
    def test_possible_ones_are_not(self, overrides):
        validate(load_config(None, [*VALID, *overrides.split()]), ARCHITECTURE, Machine(cpus=2, gpus=0))

    def test_gpus_count_where_there_are_any(self):
        config = load_config(None, [*VALID, "parallel.data_parallel_size=4", "rollout.num_engines=2"])
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=6))
        with pytest.raises(UserError, match=r"`parallel` need 4 ranks .* rollout\.num_engines=2 .* there are 5 GPUs"):
            validate(config, ARCHITECTURE, Machine(cpus=64, gpus=5))
        config.rollout.engine = "vllm"
        config.rollout.engine_tensor_parallel_size = 2
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=8))
        with pytest.raises(UserError, match=r"need 4 more GPUs, but there are 7 GPUs"):
            validate(config, ARCHITECTURE, Machine(cpus=64, gpus=7))
        config.rollout.placement = "colocated"
        config.rollout.engine_tensor_parallel_size = 1
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=4))
        supervised = load_config(None, ["model_config_path=m", "output_dir=o", "parallel.data_parallel_size=4"], SftConfig)
        validate_sft(supervised, ARCHITECTURE, Machine(cpus=2, gpus=4))

    @pytest.mark.parametrize(
        ("overrides", "machine", "message"),
        [
            ("model.fp8=hybrid", replace(H100, capability=None), "cannot run here: it needs a GPU"),
            (
                "model.fp8=hybrid",
                replace(H100, transformer_engine=None),
                "it needs Transformer Engine (pip install 'megatron-fipo[gpu]')",
            ),
            (
                "model.fp8=hybrid",
                replace(H100, transformer_engine="2.3.0"),
                "Transformer Engine 2.3.0 is installed and it needs 2.4",
            ),
            (
                "model.fp8=e4m3 model.fp8_recipe=delayed",
                replace(H100, capability=(8, 0)),
                "compute capability 8.0 and FP8 needs 8.9",
            ),
            ("model.fp8=hybrid", replace(H100, capability=(8, 9)), "blockwise needs 9.0 (Hopper); choose tensorwise"),
            ("model.fp8=hybrid", replace(H100, cuda="12.8"), "built for CUDA 12.8 and blockwise needs 12.9; choose tensorwise"),
            ("model.fp8=hybrid model.layer_spec=portable", H100, "set model.layer_spec to auto"),
            ("model.fp8=hybrid model.dtype=float32", H100, "needs model.dtype=bfloat16, not float32"),
            (
                "model.fp8=hybrid parallel.tensor_model_parallel_size=2",
                H100,
                "key size of 48 is split over parallel.tensor_model_par",
            ),
            ("model.fp8=hybrid model.fp8_recipe=delayed model.recompute=full", H100, "would recompute layers with the scales"),
            ("model.fp8_param_gather=true", H100, "needs model.fp8=hybrid or e4m3"),
            (f"{FP8_WEIGHTS} optimizer.distributed=false", H100, "needs optimizer.distributed=true"),
            (f"{FP8_WEIGHTS} model.fp8_recipe=delayed", H100, "needs model.fp8_recipe=blockwise or tensorwise"),
            (f"{FP8_WEIGHTS} optimizer.cpu_offload=0.5", H100, "cannot update weights kept in FP8"),
            (
                f"{FP8_WEIGHTS} objective.name=grpo objective.kl_coefficient=0.1",
                H100,
                "puts the initial weights in place for a while",
            ),
            (f"{FP8_WEIGHTS} deterministic=true", H100, "checkpoints hold neither FP8 weights"),
            ("model.fp8=hybrid model.fp8_recipe=delayed deterministic=true", H100, "nor delayed scales"),
            ("optimizer.state_dtype=bfloat16 optimizer.distributed=false", H100, "needs optimizer.distributed=true and"),
            ("optimizer.state_dtype=bfloat16 model.dtype=float32", H100, "and model.dtype=bfloat16"),
            ("optimizer.cpu_offload=1 model.dtype=float32", H100, "optimizer.cpu_offload=1.0 needs"),
            ("optimizer.cpu_offload=0.5 optimizer.state_dtype=bfloat16", H100, "updates float32 state only"),
            (
                "optimizer.cpu_offload=0.5",
                replace(H100, transformer_engine=None),
                "optimizer.cpu_offload=0.5 needs a GPU and Transformer Engine 2.4 or later (pip install 'megatron-fipo[gpu]'); set it to 0",
            ),
            ("optimizer.state_dtype=bfloat16", replace(H100, capability=None), "; set it to float32"),
            ("optimizer.state_dtype=bfloat16", replace(H100, transformer_engine="2.3.0"), "Transformer Engine 2.4 or later"),
            (
                "seed=2",
                replace(H100, transformer_engine=None),
                "training on GPUs needs Adam of Transformer Engine or of NVIDIA's apex",
            ),
            ("optimizer.cpu_offload=1.1", H100, "optimizer.cpu_offload has to be at least 0 and at most 1"),
        ],
    )
    def test_precision_that_cannot_be_had_is_refused(self, overrides, machine, message):
        config = load_config(None, [*VALID, *overrides.split()])
        with pytest.raises(UserError) as error:
            validate(config, ARCHITECTURE, Machine(cpus=8, gpus=int(machine.capability is not None) * 8, accelerators=machine))
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "overrides",
        [
            "model.fp8=hybrid",
            f"{FP8_WEIGHTS} optimizer.state_dtype=bfloat16",
            "model.fp8=e4m3 model.fp8_recipe=delayed optimizer.cpu_offload=0.5",
            "model.fp8=hybrid deterministic=true",
            "optimizer.cpu_offload=1",
            "optimizer.state_dtype=bfloat16",
        ],
    )
    def test_precision_that_can_is_not(self, overrides):
        config = load_config(None, [*VALID, *overrides.split()])
        validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=H100))
        validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8))  # GPUs of other machines, unknown here

    @pytest.mark.parametrize(("hidden", "message"), [(48, None), (40, "multiples of 16, but the model's hidden size is 40")])
    def test_fp8_looks_at_the_whole_hidden_size_which_no_rank_splits(self, hidden, message):
        config = load_config(None, [*VALID, "model.fp8=hybrid", "parallel.tensor_model_parallel_size=2"])
        architecture = replace(ARCHITECTURE, hidden_size=hidden, kv_channels=16)
        with pytest.raises(UserError, match=message) if message else nullcontext():
            validate(config, architecture, Machine(cpus=8, gpus=8, accelerators=H100))

    def test_either_of_two_packages_lets_gpus_train(self):
        neither = replace(H100, transformer_engine=None)
        apex = Machine(cpus=8, gpus=8, accelerators=replace(neither, apex=True))
        config = load_config(None, VALID)
        validate(config, ARCHITECTURE, apex)
        with pytest.raises(
            UserError, match=r"neither is there: with torch's, .* pip install 'megatron-fipo\[gpu\]', or build apex"
        ):
            validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=neither))

    def test_a_micro_batch_has_to_hold_the_padding_of_fp8(self):
        config = load_config(None, [*VALID, "batch.max_tokens_per_micro_batch=144", "model.fp8=hybrid"])
        with pytest.raises(UserError, match=r"256 padded tokens, .* raise it to at least 256"):
            validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=H100))
        config.model.fp8_recipe = "tensorwise"
        validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=H100))

    def test_without_a_model_or_machine_their_checks_are_left_out(self):
        validate(load_config(None, [*VALID, "parallel.tensor_model_parallel_size=3", "rollout.max_response_length=500"]))

    def test_evaluation_needs_no_training_data_but_held_out_rows(self):
        rows = ["data.source=jsonl", "reward.name=dapo_math"]
        validate_evaluation(load_config(None, [*VALID, *rows, "data.evaluation_path=e"]), ARCHITECTURE)
        with pytest.raises(UserError, match=r"data\.evaluation_path"):
            validate_evaluation(load_config(None, [*VALID, *rows, "evaluation.every=0", "evaluation.before_training=false"]))

    def test_supervised(self):
        def sft(*overrides):
            return load_config(None, ["model_config_path=m", "output_dir=o", *overrides], SftConfig)

        validate_sft(sft(), ARCHITECTURE, Machine(cpus=1, gpus=0))
        for override, message in [
            ("steps=0", "steps"),
            ("optimizer.warmup_steps=1001", "warmup_steps"),
            ("parallel.tensor_model_parallel_size=4", "key-value groups"),
            ("parallel.data_parallel_size=2", "CPU core"),
        ]:
            with pytest.raises(UserError, match=message):
                validate_sft(sft(override), ARCHITECTURE, Machine(cpus=1, gpus=0))

    def test_every_number_of_the_schema_has_a_range(self):
        """A new setting is either given a range or is one of these, which other checks look at."""
        module = __import__(validate_function.__module__, fromlist=["AT_LEAST_ONE"])
        ranged = (
            module.AT_LEAST_ONE | module.AT_LEAST_ZERO | module.ABOVE_ZERO | module.SHARES | module.BELOW_ONE | module.UP_TO_ONE
        )
        kinds = (int, float, Optional[float])
        numbers = {key for schema in (Config, SftConfig) for key, kind in leaves(schema) if kind in kinds}
        assert numbers - ranged == {"batch.responses_per_prompt", "objective.dual_clip"}
        assert ranged <= numbers


class TestArchitecture:
    def write(self, folder: Path, **changes) -> Path:
        values = {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 32,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
        }
        (folder / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
        return folder

    def test_reads_the_figures(self, tmp_path):
        assert read_architecture(self.write(tmp_path)) == ARCHITECTURE
        assert read_architecture(self.write(tmp_path, head_dim=32)) == replace(ARCHITECTURE, kv_channels=32)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; known: Qwen2ForCausalLM"),
            ({"architectures": None}, r"\(none named\) is not supported"),
            ({"hidden_size": None}, "hidden_size has to be a positive whole number, not None"),
            ({"num_hidden_layers": "4"}, "num_hidden_layers"),
            ({"num_key_value_heads": 0}, "num_key_value_heads has to be a positive whole number, not 0"),
            ({"head_dim": 1.5}, "head_dim has to be a positive whole number, not 1.5"),
            ({"vocab_size": True}, "vocab_size has to be a positive whole number, not True"),
            ({"architectures": "Qwen2ForCausalLM"}, r"\(none named\) is not supported"),
            ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=message) as error:
            read_architecture(self.write(tmp_path, **changes))
        assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
        assert "\n" not in str(error.value)

    def test_refuses_what_it_cannot_read(self, tmp_path):
        with pytest.raises(UserError, match="no model folder"):
            read_architecture(tmp_path / "absent")
        with pytest.raises(UserError, match=r"has no config\.json"):
            read_architecture(tmp_path)
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match="not valid JSON"):
            read_architecture(tmp_path)
        (tmp_path / "config.json").write_text("[]", encoding="utf-8")
        with pytest.raises(UserError, match="JSON object"):
            read_architecture(tmp_path)
