"""Checks of what a run trains on and evaluates: training sets, evaluation sets, and their limits. Pure."""

from megatron_fipo.config.schema import Config
from megatron_fipo.config.task_schema import FILE_SOURCES, LEAST_TEMPERATURE, REWARDS
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import is_import_path, sum_terms


def check_data(config: Config, training: bool) -> None:
    """Raise UserError if there is nothing to train on or to evaluate, or more than one answer to where it comes from."""
    data = config.data
    names = {name for _, name in sum_terms(config.reward.name)}
    if data.source == "countdown" and names <= set(REWARDS) - {"countdown", "http"}:
        raise UserError(
            f"data.source=countdown needs reward.name=countdown, http or a reward of your own, not {config.reward.name}"
        )
    by_function = is_import_path(data.source)
    if data.source not in FILE_SOURCES and not by_function:
        for key, given in (("evaluation.sets", config.evaluation.sets), ("data.sets", data.sets)):
            if given:
                raise UserError(
                    f"data.source={data.source} generates its problems; remove {key}, or read files with "
                    f"data.source={FILE_SOURCES[0]}"
                )
        return
    if training and data.train_path and data.sets:
        raise UserError(
            f"data.train_path={data.train_path} and data.sets are both given; make the file one of data.sets, or remove one"
        )
    if training and not (data.train_path or data.sets or by_function):
        raise UserError(
            f"data.source={data.source} needs data.train_path, a file of training rows, or data.sets, several by name"
        )
    if not config.evaluation.sets and (
        not training or config.evaluation.every or config.evaluation.before_training
    ):
        hint = ", or evaluation.every=0 and evaluation.before_training=false" if training else ""
        raise UserError(
            f"data.source={data.source} needs evaluation.sets, files of held-out rows by name such as "
            f"evaluation.sets.aime24=aime24.parquet{hint}"
        )


def check_temperatures(config: Config) -> None:
    """Raise UserError for evaluations at temperatures that vLLM would raise."""
    given = {"evaluation.temperature": config.evaluation.temperature}
    for name, entry in config.evaluation.sets.items():
        if entry.temperature is not None:
            given[f"evaluation.sets.{name}.temperature"] = entry.temperature
    for key, temperature in given.items():
        if 0 < temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"{key}={temperature:g} must be 0 (the most probable token) or at least {LEAST_TEMPERATURE}, which vLLM samples "
                "at instead"
            )


def check_limits(config: Config, training: bool) -> None:
    """Raise UserError for a set whose longest response is above that of the run, or within the overlong buffer."""
    limit, buffer = config.rollout.max_response_length, config.reward.overlong_buffer
    sets = {f"data.sets.{name}": entry.max_response_length for name, entry in config.data.sets.items()}
    limits = {f"{key}.max_response_length": of_set for key, of_set in sets.items() if of_set is not None}
    held_out = {
        f"evaluation.sets.{name}.max_response_length": entry.max_response_length
        for name, entry in config.evaluation.sets.items()
        if entry.max_response_length is not None
    }
    for key, of_set in {**(limits if training else {}), **held_out}.items():
        if of_set > limit:
            raise UserError(
                f"{key}={of_set} must be at most rollout.max_response_length={limit}, for which engines and packing are "
                "planned; lower it or raise that"
            )
    if training:
        for key, of_set in {"rollout.max_response_length": limit, **limits}.items():
            if buffer >= of_set:
                raise UserError(
                    f"reward.overlong_buffer={buffer} must be below {key}={of_set}; 0 turns the penalty off"
                )
