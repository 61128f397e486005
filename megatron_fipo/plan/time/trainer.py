"""Time of the trainer in an iteration: forward passes for log-probs, and the updates.

The slowest pipeline stage sets the pace: the last one, which has the head. Its parts are counted for every micro-batch; the
schedules' rest is `bubble`. With stage times t_s per micro-batch and v chunks to a rank, m micro-batches take

    m · max t_s + (Σ t_s − max t_s) / v                1F1B (v = 1) and interleaved

for example 8 · 1.2 + (1 + 1 + 1) = 12.6 for four stages of 1, the last of 1.2, and 8 micro-batches.

Ignored: micro-batches that differ from each other, saving and logging, the upload of packs (beside the step before),
statistics, stragglers.
"""

from collections.abc import Sequence

from megatron_fipo.families.family import Layers
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Breakdown, Estimate, added, total
from megatron_fipo.plan.experts import layer_counts
from megatron_fipo.plan.layout import mini_steps
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import pipeline_group
from megatron_fipo.plan.time.head import head_time
from megatron_fipo.plan.time.layer import LayerTime, Parts, core_attention, layer_time
from megatron_fipo.plan.time.optimizer import gradient_reduction, optimizer_time, weight_gather
from megatron_fipo.plan.time.overlap import exposed
from megatron_fipo.plan.time.packs import Packs, mini_step_packs


def update_time(case: Case, progress: float = 1.0) -> Breakdown:
    """Seconds of all optimizer steps of an iteration, by part; only what other work does not hide."""
    pack = mini_step_packs(case, progress)
    head, last, layers = head_time(case, pack), NOTHING, []
    for kind, count in _layers(case).items():
        layer = layer_time(case, pack, kind)
        again = _recomputed(case, pack, layer)
        parts_of_layer = added(
            [Breakdown(layer.forward), Breakdown(layer.backward), Breakdown({"recompute": again})]
        )
        layers.append((count, parts_of_layer.parts))
        last += (total(layer.backward.values()) + again).scaled(count)
    parts = _pipelined(case, pack, layers, total(head), directions=2)
    reduction = gradient_reduction(case)
    hidden = last + head[1] if case.config.parallel.overlap_communication else NOTHING
    parts["data parallel"] = exposed(reduction, hidden) + weight_gather(case)
    parts["optimizer"] = optimizer_time(case)
    # Between backward and AdamW the device waits: the host visits the parameters of every layer once more.
    parts["host"] += case.machine.layer_host.times(sum(_layers(case).values()), "layer_host")
    return Breakdown(parts).scaled(mini_steps(case.config))


def score_time(case: Case, progress: float = 1.0) -> Breakdown:
    """Seconds of `case.scoring_passes` forward passes over the batch. The pipeline fills once per mini-step."""
    pack = mini_step_packs(case, progress)
    head = head_time(case, pack)[0]
    layers = [(count, layer_time(case, pack, kind).forward) for kind, count in _layers(case).items()]
    parts = _pipelined(case, pack, layers, head, directions=1)
    return Breakdown(parts).scaled(mini_steps(case.config) * case.scoring_passes)


def _pipelined(
    case: Case, pack: Packs, layers: Sequence[tuple[float, Parts]], head: Estimate, directions: int
) -> dict[str, Estimate]:
    """Parts of the pass of all micro-batches through all stages. `layers`: how many layers of a stage have these parts."""
    parallel, count = case.config.parallel, pack.count
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    parts = dict(added(Breakdown(of_layer).scaled(count * number) for number, of_layer in layers).parts)
    parts["head"] = head.scaled(count)
    stage = total(total(of_layer.values()).scaled(number) for number, of_layer in layers)
    parts["bubble"] = stage.scaled((stages - 1) / chunks)
    # With several chunks sends run beside the next chunk's work, but for those that fill the pipeline.
    sends = stages - 1 + (count if chunks == 1 and stages > 1 else 0)
    parts["pipeline"] = _send(case, pack).scaled(directions * sends)
    return parts


def _send(case: Case, pack: Packs) -> Estimate:
    parallel = case.config.parallel
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    element = BYTES_PER_ELEMENT[case.config.model.dtype]
    return pipeline_group(case).send(pack.tokens * case.architecture.hidden_size * element / shards)


def _layers(case: Case) -> dict[Layers, float]:
    """Layers of a stage by kind; those of each kind count as spread evenly over the stages."""
    stages = case.config.parallel.pipeline_model_parallel_size
    return {kind: count / stages for kind, count in layer_counts(case.architecture).items()}


def _recomputed(case: Case, pack: Packs, layer: LayerTime) -> Estimate:
    mode = case.config.model.recompute
    if mode == "full":
        return total(layer.forward.values())
    return core_attention(case, pack) if mode == "selective" else NOTHING
