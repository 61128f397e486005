"""The state of an optimizer that is not distributed, in a checkpoint, in Megatron-Core's format.

With expert parallelism it has two parts: the second updates the experts. The checkpoint is the same as without: names of
tensors do not depend on the part, and hyperparameters and the number of steps are those of the first.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from typing import Any

from megatron.core.optimizer import MegatronOptimizer

EXPERTS = "experts"
"""The key of the second part's state in that of the first."""
_MASTERS = "fp32_from_fp16_params"
"""Megatron-Core's key of float32 copies of bfloat16 parameters."""
_STEP = "common_step"
"""Megatron-Core's key of the number of steps, for an Adam that counts them by parameter."""


def sharded_plain_state(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    is_loading: bool,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Megatron-Core's sharded state. `model_state` has the model's parameters as data. No collectives."""
    first, *others = _parts(optimizer)
    state = first.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    for part in others:
        of_experts = part.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        # A dictionary, because Megatron-Core cannot load a list that is empty in the stage of rank 0.
        state[EXPERTS] = {
            "state": {key: value for key, value in _adam(of_experts)["state"].items() if key != _STEP},
            _MASTERS: {
                f"{group}.{index}": tensor
                for group, tensors in enumerate(of_experts.get(_MASTERS, []))
                for index, tensor in enumerate(tensors)
            },
        }
    return state


def load_plain_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load a `sharded_plain_state` that was written by any layout."""
    first, *others = _parts(optimizer)
    of_experts = loaded.pop(EXPERTS, {})
    adam = _adam(loaded)
    common_step = {key: value for key, value in adam.get("state", {}).items() if key == _STEP}
    group_step = {key: value for key, value in adam["param_groups"][0].items() if key == "step"}
    first.load_state_dict(loaded)
    for part in others:
        state = part.state_dict()
        if _MASTERS in state:
            state[_MASTERS] = [
                [of_experts[_MASTERS][f"{group}.{index}"] for index in range(len(masters))]
                for group, masters in enumerate(state[_MASTERS])
            ]
        own = _adam(state)
        own["state"] = {**of_experts.get("state", {}), **common_step}
        for parameters in own["param_groups"]:
            parameters.pop("step", None)
            parameters.update(group_step)
        part.load_state_dict(state)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _adam(state: dict[str, Any]) -> dict[str, Any]:
    """The state of Adam in that of a part, which is Adam's alone for float32 parameters."""
    return state.get("optimizer", state)
