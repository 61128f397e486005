"""Which settings a run may change when it resumes."""

from dataclasses import replace

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.metrics_log import MetricsLog
from megatron_fipo.run_dir.run_directory import RunDirectory
from tests.run_dir.claimed_run import INPUTS, claim, claimed, config, save


def test_a_folder_belongs_to_its_settings(tmp_path):
    directory = claimed(tmp_path, "rollout.temperature=0.7")
    save(directory, 1)
    stored = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        claim(directory, config(tmp_path, "rollout.temperature=0.8", "optimizer.lr=1e-5"))
    assert "optimizer.lr was 1e-06 and is 1e-05; rollout.temperature was 0.7 and is 0.8" in str(caught.value)
    assert "--allow-change optimizer.lr,rollout.temperature" in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == stored


def test_an_earlier_run_had_the_filter_of_future_kl(tmp_path):
    """A folder from before the setting has its default; the setting changes the mathematics, so another value is refused."""
    directory = claimed(tmp_path)
    save(directory, 1)
    stored = tmp_path / "config.yaml"
    lines = [line for line in stored.read_text().splitlines() if "filter_future_kl" not in line]
    stored.write_text("\n".join(lines))
    claim(directory, config(tmp_path, "objective.filter_future_kl=true"))
    with pytest.raises(UserError, match="filter_future_kl was True and is False"):
        claim(directory, config(tmp_path, "objective.filter_future_kl=false"))


def test_named_settings_may_change_and_only_those(tmp_path):
    directory = claimed(tmp_path, "rollout.temperature=0.7")
    save(directory, 1)
    changed = config(tmp_path, "rollout.temperature=0.8", "optimizer.lr=1e-5")
    with pytest.raises(UserError, match=r"other settings \(rollout.temperature was 0.7 and is 0.8\)"):
        claim(directory, changed, ["optimizer.lr"])
    assert claim(directory, changed, ["optimizer.lr", "rollout.temperature", "objective.clip_low"]) == [
        "optimizer.lr was 1e-06 and is 1e-05",
        "rollout.temperature was 0.7 and is 0.8",
    ]
    save(directory, 2)
    assert claim(directory, changed) == []
    with pytest.raises(UserError, match=r"rollout\.temperature was 0.8 and is 0.7"):
        claim(directory, config(tmp_path, "rollout.temperature=0.7", "optimizer.lr=1e-5"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("optimizer.lrr", "optimizer.lr"), ("sead", "seed"), ("objective", "")],
)
def test_allow_change_of_no_setting_is_refused(tmp_path, key, nearest):
    with pytest.raises(
        UserError, match=f"--allow-change {key}: there is no such setting; did you mean '.*{nearest}"
    ):
        claim(RunDirectory(tmp_path / "new"), config(tmp_path / "new"), [key])
    assert not (tmp_path / "new").exists()


def test_a_run_that_never_got_anywhere_does_not_hold_its_folder(tmp_path):
    directory = claimed(tmp_path)
    claim(directory, config(tmp_path, "rollout.temperature=0.8"))
    MetricsLog(tmp_path).log("iteration", 1, {"reward/mean": 0.5})
    with pytest.raises(UserError, match=r"other settings \(rollout.temperature"):
        claim(directory, config(tmp_path, "rollout.temperature=0.9"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], ["iterations=900", "parallel.tensor_model_parallel_size=2", "run_dir=elsewhere"]),
        (
            [],
            [
                "checkpoint.keep_best=3",
                "max_walltime_minutes=30",
                "deterministic=true",
                "rollout.dump_every=1",
            ],
        ),
        (
            [],
            [
                "rollout.num_engines=4",
                "rollout.placement=colocated",
                "rollout.max_restarts=0",
                "rollout.check_weight_sync=9",
            ],
        ),
        ([], ["batch.max_tokens_per_micro_batch=30000"]),
        (["rollout.unfinished=drop"], ["rollout.prompts_in_flight=7"]),
        (["objective.normalization=response_mean"], ["batch.max_tokens_per_micro_batch=30000"]),
    ],
)
def test_what_a_run_may_change(tmp_path, first, then):
    directory = claimed(tmp_path, *first)
    save(directory, 1)
    assert claim(directory, config(tmp_path, *first, *then)) == []


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], "rollout.temperature=0.9"),
        ([], "rollout.max_staleness=3"),
        ([], "rollout.engine=vllm"),
        (["objective.normalization=reference_micro_batch"], "batch.max_tokens_per_micro_batch=30000"),
        (["objective.normalization=reference_micro_batch"], "parallel.data_parallel_size=2"),
        (["objective.normalization=reference_micro_batch"], "parallel.context_parallel_size=2"),
        (["rollout.unfinished=continue"], "rollout.prompts_in_flight=7"),
        (["environment.name=tools:python"], "environment.name=tools:search"),
        (["environment.name=tools:python"], "environment.max_turns=3"),
        ([], "environment.stop=[x]"),
        ([], "environment.max_observation_tokens=7"),
    ],
)
def test_what_a_run_may_not_change(tmp_path, first, then):
    directory = claimed(tmp_path, *first)
    save(directory, 1)
    with pytest.raises(UserError, match=then.partition("=")[0]):
        claim(directory, config(tmp_path, *first, then))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_packing_is_fixed_while_either_normalization_depends_on_it(tmp_path, order):
    normalization = [f"objective.normalization={name}" for name in ("token_mean", "reference_micro_batch")]
    directory = claimed(tmp_path, normalization[order[0]])
    save(directory, 1)
    with pytest.raises(UserError, match=r"parallel\.data_parallel_size was 1 and is 2"):
        claim(
            directory,
            config(tmp_path, normalization[order[1]], "parallel.data_parallel_size=2"),
            ["objective.normalization"],
        )


def test_the_settings_that_count_are_those_of_the_newest_checkpoint(tmp_path):
    """Not those of config.yaml, which a run may have written that was refused, or that changed settings and
    never saved.
    """
    directory = claimed(tmp_path, "checkpoint.keep_last=2", "rollout.temperature=0.7")
    save(directory, 1)
    claim(directory, config(tmp_path, "rollout.temperature=0.8"), ["rollout.temperature"])
    claim(directory, config(tmp_path, "rollout.temperature=0.7"))
    with pytest.raises(UserError, match=r"rollout\.temperature was 0.7 and is 0.8"):
        claim(directory, config(tmp_path, "rollout.temperature=0.8"))


@pytest.mark.parametrize(
    ("change", "words"),
    [("seed=2", "seed was 1 and is 2"), ("model.router.trainable=true", "trainable was False and is True")],
)
def test_what_a_run_cannot_change_is_refused_even_if_it_is_allowed(tmp_path, change, words):
    """The order of the training data follows from the seed; a checkpoint has the optimizer's state of what was trained."""
    directory = claimed(tmp_path)
    save(directory, 1)
    with pytest.raises(UserError, match=rf"{words}\): restore them, or choose another run_dir$"):
        claim(directory, config(tmp_path, change), [change.partition("=")[0]])


SETS = ("data.sets.math=m.parquet", "data.sets.code=c.parquet", "data.sets.code.weight=2")
DIGESTS = replace(INPUTS, train={"math": "m", "code": "c"})


def resumed_with_sets(run_dir, *changes, train=DIGESTS.train, allow=()):
    directory = RunDirectory(run_dir)
    directory.claim(config(run_dir, *SETS), DIGESTS)
    save(directory, 1)
    return directory.claim(config(run_dir, *SETS, *changes), replace(DIGESTS, train=train), allow)


def test_training_sets_may_move_and_change_their_reward_if_that_is_allowed(tmp_path):
    assert resumed_with_sets(tmp_path / "a", "data.sets.math=/data/other.parquet") == []
    with pytest.raises(
        UserError, match=r"data.sets.code.reward was None and is countdown\).*--allow-change data.sets$"
    ):
        resumed_with_sets(tmp_path / "b", "data.sets.code.reward=countdown")
    allowed = resumed_with_sets(tmp_path / "c", "data.sets.code.max_response_length=9", allow=["data.sets"])
    assert allowed == ["data.sets.code.max_response_length was None and is 9"]


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        (["data.sets.code.weight=3"], DIGESTS.train, r"data.sets.code.weight was 2.0 and is 3.0\)"),
        ([], {"math": "m", "code": "x"}, r"data.sets.code.path has other training problems than the run\)"),
        (
            ["data.sets.more=x"],
            DIGESTS.train | {"more": "x"},
            r"\(data.sets.more was absent and is present\)",
        ),
        (["data.sets.code=null"], {"math": "m"}, r"\(data.sets.code was present and is absent\)"),
        (["data.sets={}"], "m", "data.train_path has other training problems than the run"),
    ],
)
def test_other_rows_sets_and_weights_are_refused_always(tmp_path, changes, train, message):
    with pytest.raises(UserError, match=message) as error:
        resumed_with_sets(tmp_path, *changes, train=train, allow=["data.sets", "data.train_path"])
    assert str(error.value).endswith("restore them, or choose another run_dir")
