from contextlib import nullcontext
from dataclasses import fields, replace

import pytest

from megatron_fipo.config import (
    Config,
    SftConfig,
    load_config,
    validate,
    validate_evaluation,
    validate_sft,
)
from megatron_fipo.environment import Accelerators, Machine
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import Range
from megatron_fipo.fields import rule_of
from tests.config.test_load import schemas
from tests.model.test_architecture import ARCHITECTURE

REQUIRED = ["model.path=m", "run_dir=r"]
VALID = [*REQUIRED, "data.source=countdown", "reward.name=countdown"]
VALID += ["rollout.max_prompt_length=16", "rollout.max_response_length=128", "reward.overlong_buffer=32"]
H100 = Accelerators(capability=(9, 0), cuda="13.0", transformer_engine="2.9.0")
FP8_WEIGHTS = "model.fp8=hybrid model.fp8_param_gather=true"


class TestValidate:
    def test_the_base_of_these_tests_is_valid(self):
        validate(load_config(None, VALID), ARCHITECTURE, Machine(cpus=2, gpus=0))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("parallel.tensor_model_parallel_size=3", "does not divide the model's 4 attention heads"),
            (
                "parallel.tensor_model_parallel_size=4",
                "does not divide the model's 2 key-value heads; choose a divisor of 2",
            ),
            ("parallel.pipeline_model_parallel_size=3", "does not divide the model's 4 layers"),
            (
                "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=3",
                "does not divide the model's 4 layers",
            ),
            ("parallel.virtual_pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size"),
            ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size above 1"),
            (
                "parallel.context_parallel_size=0",
                "parallel.context_parallel_size must be at least 1",
            ),
            (
                "parallel.data_parallel_size=3",
                "need 3 ranks (tensor 1 x pipeline 1 x context 1 x data 3), but there are 2 CPU cores",
            ),
            (
                "parallel.overlap_communication=true optimizer.distributed=false",
                "needs optimizer.distributed=true",
            ),
            ("model.layer_spec=transformer_engine", "needs a GPU"),
            ("batch.mini_batch_prompts=60", "must divide"),
            ("batch.responses_per_prompt=1", "at least 2"),
            ("batch.max_tokens_per_micro_batch=143", "raise it to at least 144"),
            (
                "batch.max_tokens_per_micro_batch=71 parallel.context_parallel_size=2",
                "raise it to at least 72",
            ),
            ("rollout.max_prompts=10", "can never give"),
            (
                "reward.by_data_source.a=code reward.code.test_timeout_s=6",
                "above half of reward.timeout_s=10",
            ),
            ("reward.name=http", "needs reward.http.url"),
            ("reward.by_data_source.a=http", "needs reward.http.url"),
            (
                "reward.name=http reward.http.url=https://me:secret@host/",
                "reward.http.url has a user or password",
            ),
            ("reward.name=http reward.http.url=ftp://host/", "must be https://HOST:PORT/PATH"),
            ("reward.name=http reward.http.url=http://host:x/", "must be https://HOST:PORT/PATH"),
            (
                "reward.name=http reward.http.url=https://host reward.http.token_variable=ab-12",
                "must be the name of an environment variable, not the token",
            ),
            (
                "reward.name=http reward.http.url=http://host reward.http.token_variable=JUDGE_TOKEN",
                "would send the token unencrypted",
            ),
            (
                "reward.name=http reward.http.url=https://host",
                "4 requests of 30 s and their waits may take 127 s; raise it to at least 142",
            ),
            ("rollout.engine_tensor_parallel_size=2", "needs rollout.engine=vllm"),
            ("rollout.engine=vllm rollout.engine_tensor_parallel_size=3", "does not divide the model's"),
            (
                "rollout.engine=mine:Engine rollout.placement=colocated",
                "needs rollout.engine=vllm or local, not mine:Engine",
            ),
            ("rollout.placement=colocated rollout.mode=one_step_off", "needs rollout.mode=synchronous"),
            (
                "rollout.engine=vllm rollout.placement=colocated rollout.mode=one_step_off",
                "needs rollout.mode=synchronous",
            ),
            ("rollout.engine=vllm rollout.placement=colocated rollout.num_engines=2", "do not fit"),
            ("rollout.mode=one_step_off rollout.max_staleness=0", "raise rollout.max_staleness"),
            (
                "deterministic=true rollout.mode=fully_asynchronous rollout.unfinished=continue",
                "deterministic=true needs",
            ),
            ("deterministic=true rollout.unfinished=continue", "deterministic=true needs"),
            ("rollout.mode=fully_asynchronous", "needs rollout.unfinished=continue"),
            (
                "rollout.unfinished=continue rollout.max_staleness=0",
                "needs rollout.max_staleness of at least 1",
            ),
            (
                "rollout.mode=one_step_off rollout.unfinished=continue",
                "needs rollout.max_staleness of at least 2",
            ),
            ("objective.correction=mis rollout.top_p=0.9", "compares complete distributions"),
            (
                "objective.correction=mis rollout.top_k=20",
                "rollout.top_k=20 truncates them; set rollout.top_k=0",
            ),
            ("objective.correction=mis rollout.min_p=0.1", "rollout.min_p=0.1 truncates them"),
            (
                "rollout.vllm.max_num_seqs=8",
                "rollout.vllm has arguments of vLLM and needs rollout.engine=vllm, not local",
            ),
            ("checkpoint.keep_last=0", "checkpoint.keep_last must be at least 1"),
            ("max_walltime_minutes=0", "max_walltime_minutes must be above 0"),
            ("objective.correction_cap=0", "objective.correction_cap must be above 0"),
            ("rollout.max_staleness=-1", "rollout.max_staleness must be at least 0"),
            ("rollout.weight_bucket_mb=0", "rollout.weight_bucket_mb must be at least 1"),
            ("rollout.temperature=0", "rollout.temperature must be at least 0.01"),
            ("rollout.temperature=0.009", "rollout.temperature must be at least 0.01"),
            ("evaluation.temperature=0.005", "evaluation.temperature=0.005 must be 0"),
            ("rollout.top_p=1.1", "rollout.top_p must be above 0 and at most 1"),
            ("rollout.max_response_length=500", "516 tokens exceed the model's max_position_embeddings=512"),
            ("objective.half_life=0", "objective.half_life must be above 0"),
            ("objective.half_life=.nan", "objective.half_life must be above 0"),
            ("objective.influence_clip=[1.2,1.0]", "two non-decreasing numbers"),
            ("objective.influence_clip=[1.0]", "must be a list of 2 values, each a number"),
            ("objective.dual_clip=1.2", "must be above 1 + clip_high = 1.28"),
            ("objective.clip_low=1.0", "objective.clip_low must be at least 0 and below 1"),
            ("objective.kl_coefficient=0.1", "is for grpo only"),
            ("objective.name=grpo objective.normalization=reference_micro_batch", "is not for grpo"),
            (
                "objective.name=grpo objective.clip_low=0.5 objective.dual_clip=1.4",
                "1 + clip_low = 1.5",
            ),
            ("optimizer.lr=.inf", "optimizer.lr must be finite"),
            ("optimizer.lr=0", "optimizer.lr must be above 0"),
            ("reward.overlong_buffer=128", "must be below rollout.max_response_length=128"),
            ("reward.name=dapo_math", "needs reward.name=countdown"),
            ("data.source=jsonl reward.name=dapo_math", "needs data.train_path"),
            ("data.source=jsonl reward.name=dapo_math data.train_path=t", "needs evaluation.sets"),
            (
                "evaluation.sets.aime24=a",
                "data.source=countdown generates its problems; remove evaluation.sets",
            ),
            ("data.sets.math=a", "data.source=countdown generates its problems; remove data.sets"),
            (
                "data.source=jsonl reward.name=dapo_math data.train_path=t data.sets.math=a",
                "data.train_path=t and data.sets are both given",
            ),
            (
                "data.source=a.b:c reward.name=dapo_math",
                "data.source=a.b:c needs evaluation.sets",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.sets.math=a data.sets.math.max_response_length=129",
                "needs evaluation.sets",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.sets.math=a data.sets.math.max_response_length=129 "
                "evaluation.sets.one=e",
                "data.sets.math.max_response_length=129 must be at most rollout.max_response_length=128",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.train_path=a evaluation.sets.one=e "
                "evaluation.sets.one.max_response_length=129",
                "evaluation.sets.one.max_response_length=129 must be at most rollout.max_response_length=128",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.sets.math=a data.sets.math.max_response_length=20 "
                "reward.overlong_buffer=20 evaluation.sets.one=e",
                "reward.overlong_buffer=20 must be below data.sets.math.max_response_length=20",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.train_path=t evaluation.every=0",
                "evaluation.before_training=false",
            ),
            (
                "data.source=jsonl reward.name=dapo_math data.train_path=t evaluation.before_training=false",
                "evaluation.every=0 and",
            ),
            ("iterations=0", "iterations must be at least 1"),
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
            "rollout.placement=colocated",
            "rollout.mode=fully_asynchronous rollout.unfinished=continue objective.correction=tis",
            "deterministic=true rollout.mode=one_step_off",
            "batch.max_tokens_per_micro_batch=144",
            "rollout.max_response_length=496",
        ],
    )
    def test_possible_ones_are_not(self, overrides):
        validate(load_config(None, [*VALID, *overrides.split()]), ARCHITECTURE, Machine(cpus=2, gpus=0))

    def test_gpus_count_where_there_are_any(self):
        overrides = ["parallel.data_parallel_size=4", "rollout.num_engines=2", "rollout.placement=separate"]
        config = load_config(None, [*VALID, *overrides])
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=6))
        with pytest.raises(
            UserError, match=r"`parallel` need 4 ranks .* rollout\.num_engines=2 .* there are 5 GPUs"
        ):
            validate(config, ARCHITECTURE, Machine(cpus=64, gpus=5))
        config.rollout.engine = "vllm"
        config.rollout.engine_tensor_parallel_size = 2
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=8))
        with pytest.raises(UserError, match=r"need 4 more GPUs, but there are 7 GPUs"):
            validate(config, ARCHITECTURE, Machine(cpus=64, gpus=7))
        config.rollout.placement = "colocated"
        config.rollout.engine_tensor_parallel_size = 1
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=4))
        supervised = load_config(
            None, ["model_config_path=m", "output_dir=o", "parallel.data_parallel_size=4"], SftConfig
        )
        validate_sft(supervised, ARCHITECTURE, Machine(cpus=2, gpus=4))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("rollout.placement=separate", "share the ranks' GPUs: rollout.placement=colocated does that"),
            (
                "rollout.mode=one_step_off",
                "rollout.placement=colocated needs rollout.mode=synchronous, not one",
            ),
            (
                "rollout.num_engines=2",
                "so rollout.num_engines=2 of rollout.engine_tensor_parallel_size=1 do not fit",
            ),
            ("rollout.engine=mine:Engine", "needs rollout.engine=vllm or local, not mine:Engine"),
            (
                "parallel.data_parallel_size=2",
                "need 2 ranks (tensor 1 x pipeline 1 x context 1 x data 2), but there are 1 GPUs",
            ),
        ],
    )
    def test_engines_that_cannot_share_the_only_gpu_are_refused_with_the_reason(self, overrides, message):
        config = load_config(None, [*VALID, *overrides.split()])
        with pytest.raises(UserError) as error:
            validate(config, ARCHITECTURE, Machine(cpus=64, gpus=1))
        assert message in str(error.value)
        assert "there are 1 GPUs" in str(error.value)
        validate(config, ARCHITECTURE, Machine(cpus=64, gpus=1, may_grow=True))

    def test_one_gpu_is_enough(self):
        validate(load_config(None, VALID), ARCHITECTURE, Machine(cpus=2, gpus=1))

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
            (
                "model.fp8=hybrid",
                replace(H100, capability=(8, 9)),
                "blockwise needs 9.0 (Hopper); choose tensorwise",
            ),
            ("model.fp8=hybrid", replace(H100, capability=(10, 0)), "compute capability 10.0 needs 2.10"),
            (
                "model.fp8=hybrid",
                replace(H100, cuda="12.8"),
                "built for CUDA 12.8 and blockwise needs 12.9; choose tensorwise",
            ),
            ("model.fp8=hybrid model.layer_spec=portable", H100, "set model.layer_spec to auto"),
            ("model.fp8=hybrid model.dtype=float32", H100, "needs model.dtype=bfloat16, not float32"),
            (
                "model.layer_spec=transformer_engine model.dtype=float32",
                H100,
                "needs dtype=bfloat16, not float32",
            ),
            (
                "model.fp8=hybrid parallel.tensor_model_parallel_size=2",
                H100,
                "key size of 48 is sharded over parallel.tensor_model_par",
            ),
            (
                "model.fp8=hybrid model.fp8_recipe=delayed model.recompute=full",
                H100,
                "would recompute layers with the scales",
            ),
            ("model.fp8_param_gather=true", H100, "needs model.fp8=hybrid or e4m3"),
            (f"{FP8_WEIGHTS} optimizer.distributed=false", H100, "needs optimizer.distributed=true"),
            (
                f"{FP8_WEIGHTS} model.fp8_recipe=delayed",
                H100,
                "needs model.fp8_recipe=blockwise or tensorwise",
            ),
            (f"{FP8_WEIGHTS} optimizer.cpu_offload=0.5", H100, "cannot update weights kept in FP8"),
            (
                f"{FP8_WEIGHTS} objective.name=grpo objective.kl_coefficient=0.1",
                H100,
                "loads the initial weights temporarily",
            ),
            (f"{FP8_WEIGHTS} deterministic=true", H100, "checkpoints contain neither FP8 weights"),
            ("model.fp8=hybrid model.fp8_recipe=delayed deterministic=true", H100, "nor delayed scales"),
            (
                "optimizer.state_dtype=bfloat16 optimizer.distributed=false",
                H100,
                "needs optimizer.distributed=true and",
            ),
            ("optimizer.state_dtype=bfloat16 model.dtype=float32", H100, "and model.dtype=bfloat16"),
            ("optimizer.cpu_offload=1 model.dtype=float32", H100, "optimizer.cpu_offload=1.0 needs"),
            ("optimizer.cpu_offload=0.5 optimizer.state_dtype=bfloat16", H100, "updates float32 state only"),
            (
                "optimizer.cpu_offload=0.5",
                replace(H100, transformer_engine=None),
                "optimizer.cpu_offload=0.5 needs a GPU and Transformer Engine 2.4 or later (pip install 'megatron-fipo[gpu]'); set it to 0",
            ),
            ("optimizer.state_dtype=bfloat16", replace(H100, capability=None), "; set it to float32"),
            (
                "optimizer.state_dtype=bfloat16",
                replace(H100, transformer_engine="2.3.0"),
                "Transformer Engine 2.4 or later",
            ),
            (
                "seed=2",
                replace(H100, transformer_engine=None),
                "training on GPUs needs Adam of Transformer Engine or of NVIDIA's apex",
            ),
            ("optimizer.cpu_offload=1.1", H100, "optimizer.cpu_offload must be at least 0 and at most 1"),
        ],
    )
    def test_precision_that_cannot_be_had_is_refused(self, overrides, machine, message):
        with pytest.raises(UserError) as error:
            validate(
                load_config(None, [*VALID, *overrides.split()]),
                ARCHITECTURE,
                Machine(cpus=8, gpus=int(machine.capability is not None) * 8, accelerators=machine),
            )
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

    @pytest.mark.parametrize(
        ("hidden", "message"), [(48, None), (40, "multiples of 16, but the model's hidden size is 40")]
    )
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
            UserError,
            match=r"neither is installed: with torch's, .* pip install 'megatron-fipo\[gpu\]', or build apex",
        ):
            validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=neither))

    def test_a_micro_batch_has_to_hold_the_padding_of_fp8(self):
        config = load_config(None, [*VALID, "batch.max_tokens_per_micro_batch=144", "model.fp8=hybrid"])
        with pytest.raises(UserError, match=r"256 padded tokens, .* raise it to at least 256"):
            validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=H100))
        config.model.fp8_recipe = "tensorwise"
        validate(config, ARCHITECTURE, Machine(cpus=8, gpus=8, accelerators=H100))

    def test_without_a_model_or_machine_their_checks_are_left_out(self):
        validate(
            load_config(
                None, [*VALID, "parallel.tensor_model_parallel_size=3", "rollout.max_response_length=500"]
            )
        )

    def test_evaluation_needs_no_training_data_but_held_out_rows(self):
        rows = ["data.source=jsonl", "reward.name=dapo_math"]
        validate_evaluation(load_config(None, [*VALID, *rows, "evaluation.sets.one=e"]), ARCHITECTURE)
        with pytest.raises(UserError, match=r"evaluation\.sets"):
            validate_evaluation(
                load_config(None, [*VALID, *rows, "evaluation.every=0", "evaluation.before_training=false"])
            )

    def test_a_source_that_generates_its_problems_needs_no_file(self):
        config = load_config(None, VALID)
        config.data.source, config.reward.name = "generated", "generated"  # as a task of the user's would be
        validate(config, ARCHITECTURE, Machine(cpus=2, gpus=0))

    def test_every_number_of_the_schema_has_a_range(self):
        kinds = (int, float, int | None, float | None)
        numbers = [
            (schema.__name__, item)
            for root in (Config, SftConfig)
            for schema in schemas(root)
            for item in fields(schema)
            if item.type in kinds
        ]
        assert len(numbers) > 50
        assert [(name, item.name) for name, item in numbers if not isinstance(rule_of(item), Range)] == []
