import pytest

from megatron_fipo.batching.packing import micro_batch_multiple, plan_micro_batches
from megatron_fipo.plan.time.packs import mini_step_packs
from tests.plan.time.cases import case_of, layout


@pytest.mark.parametrize("mean", [300.0, 3_000.0, 9_500.0, 17_000.0])
@pytest.mark.parametrize(
    "sizes", [layout(), layout(tp=4, cp=2), layout(dp=4), layout(pp=4, dp=2, vpp=2)], ids=str
)
def test_micro_batches_are_those_of_the_packer(mean, sizes):
    """Within one in thirty: the packer works on whole sequences, and looks for a balance first."""
    case = case_of(mean, batch__mini_batch_prompts=32, **sizes)
    work, parallel, batch = case.workload(), case.config.parallel, case.config.batch
    lengths = [round(work.prompt_tokens + length) for length in work.response.quantiles]
    assert len(lengths) == batch.mini_batch_prompts * batch.responses_per_prompt
    packing = plan_micro_batches(
        lengths,
        data_parallel_size=parallel.data_parallel_size,
        token_budget=batch.max_tokens_per_micro_batch * parallel.context_parallel_size,
        length_multiple=parallel.length_multiple,
        count_multiple=micro_batch_multiple(
            parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        ),
    )
    packs = mini_step_packs(case)
    assert packs.count == pytest.approx(len(packing[0]), rel=1 / 30)
    tokens = packs.count * packs.tokens * parallel.data_parallel_size * parallel.context_parallel_size
    assert tokens == pytest.approx(sum(lengths), rel=0.01)
    pairs = packs.count * packs.pairs * parallel.data_parallel_size * parallel.context_parallel_size
    assert pairs == pytest.approx(sum(length * length for length in lengths) / 2, rel=0.01)


def test_sequences_of_more_than_half_a_budget_have_it_alone():
    case = case_of(
        9_500.0, rollout__max_response_length=9_600, batch__max_tokens_per_micro_batch=11_648, **layout()
    )
    assert mini_step_packs(case).count > 0.9 * 256


def test_interleaved_stages_take_complete_groups():
    assert mini_step_packs(case_of(300.0, **layout(pp=4, vpp=2))).count % 4 == 0


def test_fp8_pads_packs():
    plain, fp8 = (mini_step_packs(case_of(model__fp8=kind)) for kind in ("none", "hybrid"))
    assert fp8.tokens - plain.tokens == pytest.approx(63.5)
