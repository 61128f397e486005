"""Which setting names which reward."""

from megatron_fipo.config.schema import Config


def reward_keys(config: Config) -> dict[str, str]:
    """The setting that names each sum of rewards, the most general one if several do."""
    keys = {config.reward.name: "reward.name"}
    for section, sets in (("data", config.data.sets), ("evaluation", config.evaluation.sets)):
        for name, settings in sets.items():
            if settings.reward is not None:
                keys.setdefault(settings.reward, f"{section}.sets.{name}.reward")
    for name, reward in config.reward.by_data_source.items():
        keys.setdefault(reward, f"reward.by_data_source.{name}")
    return keys
