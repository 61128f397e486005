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
    "and log are those of the iteration before. The legend shows the last iteration. Rollout, old log-probs and update grow with "
    "response length. Healthy: the other parts are thin, except the evaluation when there is one.",
    tuple(Line(f"time/{phase.name}", phase.label, PHASE_COLORS[phase.name]) for phase in PHASES),
    unit="s",
    stacked=True,
)

COST = Section(
    "What does it cost?",
    (
        WHERE_THE_TIME_WENT,
        Panel(
            "Throughput per GPU",
            "Of the complete iteration (prompt and response tokens trained on, over all GPUs), of the engines (response "
            "tokens received) and of the trainer (tokens trained on). On a CPU each rank and each engine counts as one GPU. "
            "Healthy: level; the trainer's rate falls slowly as responses grow, since attention costs L².",
            (
                Line("throughput/tokens_per_s_per_gpu", "iteration"),
                Line("throughput/rollout_tokens_per_s_per_gpu", "engines", "orange"),
                Line("throughput/train_tokens_per_s_per_gpu", "trainer", "teal"),
            ),
            unit="tokens/s",
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
            "Load of experts",
            "Tokens of the busiest and of the least busy expert over the mean of its layer, mean over layers. 1 is an even spread. "
            "Healthy: level. An expert-parallel rank with busy experts makes the others wait.",
            (Line("router/load_max", "busiest"), Line("router/load_min", "least busy", "teal")),
            reference=1.0,
            from_zero=True,
        ),
        Panel(
            "Routes of the engine",
            "Share of tokens and layers for which the rollout engine reported no route, and for which the trainer's router would have "
            "chosen other experts. Healthy: missing near the share of padding, differing a few percent and level.",
            (Line("router/missing", "missing"), Line("router/differing", "differing", "orange")),
            unit="share",
            from_zero=True,
        ),
        Panel(
            "KV cache and prefix cache",
            "Means over the engines.",
            (
                Line(
                    "engine_mean/kv_use",
                    "KV cache in use",
                    note="Use of the KV cache while an engine has requests. Healthy: high, without preemptions.",
                ),
                Line(
                    "engine_mean/prefix_hits",
                    "prefix hits",
                    "teal",
                    note="Prefix hits: share of prompt and prefix tokens that were not computed again.",
                ),
            ),
            unit="share",
            from_zero=True,
        ),
        Panel(
            "Requests in an engine",
            "Running and waiting in the engine while it has any, means over the engines. Healthy: many running, none waiting.",
            (
                Line("engine_mean/running", "running"),
                Line("engine_mean/waiting", "waiting", "orange"),
                Line(
                    "engine_mean/preemptions",
                    "preemptions",
                    "magenta",
                    note="Preemptions: requests stopped for lack of space and computed again. Healthy: few.",
                ),
            ),
            from_zero=True,
        ),
        Panel(
            "Peak memory",
            "Of the rank that needs most.",
            (
                Line(
                    "memory/device_gib",
                    "device, allocated",
                    note="Device memory: the largest during the iteration. Healthy: level.",
                ),
                Line("memory/reserved_gib", "device, reserved", "grey"),
                Line(
                    "memory/host_gib",
                    "host",
                    "orange",
                    note="Host memory: the largest since the rank's process began, so it falls only when ranks start again. "
                    "Healthy: it levels off when responses stop growing; steady growth after that is a leak.",
                ),
            ),
            unit="GiB",
            from_zero=True,
        ),
        Panel(
            "Overhead",
            "Parts of the phases above: put stores the batch for the ranks, unpickle reads it and shards waits for its parts "
            "(both of the slowest rank), dump writes the responses. Scoring is added up over all scorers, evaluations "
            "included, while the driver does other work: it may be larger than the iteration.",
            (
                Line("overhead/put", "put"),
                Line("overhead/unpickle", "unpickle", "teal"),
                Line("overhead/shards", "shards", "orange"),
                Line("overhead/scoring", "scoring", "magenta"),
                Line("overhead/dump", "dump", "grey"),
            ),
            unit="s",
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
