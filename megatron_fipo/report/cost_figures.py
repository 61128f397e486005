"""The panels about time, throughput and memory."""

from megatron_fipo.phases import PHASES
from megatron_fipo.report.panel import Color, Line, Panel, Section

PHASE_COLORS: dict[str, Color] = {
    "rollout": "blue",
    "plan": "brown",
    "handover": "violet",
    "old_log_probs": "teal",
    "update": "orange",
    "rollout_wait": "sky",
    "weight_sync": "magenta",
    "evaluation": "green",
    "checkpoint": "red",
    "log": "gold",
    "other": "grey",
}

WHERE_THE_TIME_WENT = Panel(
    "Where the time went",
    "Seconds of each iteration, from the end of the one before to its own end; the parts add up to it. Evaluation, checkpoint "
    "and log are those of the iteration before. Rollout usually dominates and grows with response length. Healthy: "
    "everything besides rollout, old log-probs and update is thin.",
    tuple(Line(f"time/{phase.name}", phase.label, PHASE_COLORS[phase.name]) for phase in PHASES),
    stacked=True,
)

COST = Section(
    "What does it cost?",
    (
        WHERE_THE_TIME_WENT,
        Panel(
            "Tokens per second and GPU",
            "Of the complete iteration (prompt and response tokens trained on, over all GPUs), of the engines (response "
            "tokens sampled) and of the trainer (tokens trained on). Healthy: level; the trainer's rate falls slowly as "
            "responses grow, since attention costs L².",
            (
                Line("throughput/tokens_per_s_per_gpu", "iteration"),
                Line("throughput/rollout_tokens_per_s_per_gpu", "engines", "orange"),
                Line("throughput/train_tokens_per_s_per_gpu", "trainer", "teal"),
            ),
            from_zero=True,
        ),
        Panel(
            "Model FLOPs utilization",
            "FLOPs that the model needs, without padding and recomputation, divided by the ranks' dense BF16 peak. Healthy: "
            "level. A low value means small micro-batches, padding, recomputation or waiting for other ranks.",
            (Line("mfu/old_log_probs", "old log-probs", "teal"), Line("mfu/update", "update", "orange")),
            unit="share",
            from_zero=True,
        ),
        Panel(
            "Waiting for the other side",
            "Share of the iteration in which the trainer waits for groups, and in which an engine has no request (mean over "
            "the engines). A synchronous run alternates, so both are large; with sampling during the update the side that "
            "never waits is the bottleneck.",
            (Line("wait/trainer", "trainer"), Line("engine_mean/idle", "engines", "orange")),
            unit="share",
            from_zero=True,
        ),
        Panel(
            "KV cache and prefix cache",
            "Use of the KV cache while an engine has requests, and share of prompt tokens that were not computed again, means "
            "over the engines. Healthy: a high use without preemptions.",
            (
                Line("engine_mean/kv_use", "KV cache in use"),
                Line("engine_mean/prefix_hits", "prefix hits", "teal"),
            ),
            unit="share",
            from_zero=True,
        ),
        Panel(
            "Requests in an engine",
            "Running and waiting in the engine while it has any, and requests preempted for lack of space, means over the "
            "engines. Healthy: many running, none waiting, few preempted.",
            (
                Line("engine_mean/running", "running"),
                Line("engine_mean/waiting", "waiting", "orange"),
                Line("engine_mean/preemptions", "preempted", "magenta"),
            ),
            from_zero=True,
        ),
        Panel(
            "Peak memory",
            "GiB of the rank that needs most: allocated and reserved on its device during the iteration, and in host memory "
            "since it began. Healthy: level; growth of host memory is a leak.",
            (
                Line("memory/device_gib", "device, allocated"),
                Line("memory/reserved_gib", "device, reserved", "grey"),
                Line("memory/host_gib", "host", "orange"),
            ),
            from_zero=True,
        ),
        Panel(
            "Overhead",
            "Seconds within the phases above: storing the batch for the ranks, unpickling it and making shards (the slowest "
            "rank), scoring, and the dump.",
            (
                Line("overhead/put", "store"),
                Line("overhead/unpickle", "unpickle", "teal"),
                Line("overhead/shards", "shards", "orange"),
                Line("overhead/scoring", "scoring", "magenta"),
                Line("overhead/dump", "dump", "grey"),
            ),
            from_zero=True,
        ),
        Panel(
            "Groups",
            "What happened to the generated groups. Groups that are all right or all wrong have zero "
            "advantage and are filtered; healthy: most are used.",
            (
                Line("groups/used", "used"),
                Line("groups/surplus", "kept for later", "teal"),
                Line("groups/all_right", "all right", "orange"),
                Line("groups/all_wrong", "all wrong", "magenta"),
                Line("groups/failed", "failed", "grey"),
                Line("groups/unscored", "not scored", "brown"),
            ),
            stacked=True,
        ),
        Panel(
            "Prompts",
            "Prompts that dynamic sampling needed until an iteration had its groups. Growth means that "
            "the problems have become too easy or remain too hard.",
            (Line("rollout/prompts", "prompts"),),
            from_zero=True,
        ),
        Panel(
            "Staleness",
            "Weight versions between a token's sampling and its update, mean over responses. 0 in "
            "synchronous runs that drop unfinished responses.",
            (Line("staleness/mean", "mean"), Line("staleness/max", "largest", "grey")),
            from_zero=True,
        ),
        Panel(
            "Generated tokens",
            "Response tokens per iteration: trained on, of filtered groups, and dropped because they "
            "were not needed or too old.",
            (
                Line("tokens/used", "used"),
                Line("tokens/filtered", "filtered", "orange"),
                Line("tokens/dropped", "dropped", "magenta"),
            ),
            stacked=True,
        ),
    ),
)
