"""Configuration files: what they may look like, and what is said about those that cannot be read."""

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.errors import UserError

GOOD = "model:\n  path: m\nrun_dir: r\nseed: 7\n"


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode(),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.encode("utf-16"),
        b"---\n" + GOOD.encode(),
        b"---\n" + GOOD.encode() + b"...\n",
        b"# \xc3\xa9\n" + GOOD.encode(),
        b"model: &m {path: m}\nrun_dir: r\nseed: 7\n",
        b'{"model": {"path": "m"}, "run_dir": "r", "seed": 7}',
        b"\n\n" + GOOD.encode().rstrip(),
    ],
)
def test_ways_to_write_the_same_file(content, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    config = load_config(tmp_path / "c.yaml", [])
    assert (config.model.path, config.run_dir, config.seed) == ("m", "r", 7)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n", "null", "\ufeff", "\r\n\r\n"])
def test_an_empty_file_gives_no_setting(content, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content.encode())
    expected = Config()
    expected.model.path, expected.run_dir = "m", "r"
    assert load_config(tmp_path / "c.yaml", ["model.path=m", "run_dir=r"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.path: x", "line 1: 'model.path' is not one key; write 'path' in the section 'model:'"),
        (
            "seed: 1\noptimizer.lr: 1",
            "line 2: 'optimizer.lr' is not one key; write 'lr' in the section 'optimizer:'",
        ),
        ("model: {model.path: x}", "'model.path' is not one key; write 'path' in the section 'model:'"),
        ("optimizer.l: 1", "'optimizer.l' is not one key; write 'lr' in the section 'optimizer:'"),
        ("rollout:\n  engine.name: vllm", "write 'engine' in the section 'rollout:'"),
        ("a.b: 1", "'a.b' is not one key; write 'path' in the section 'model:'"),
        ("model:\n  path: a\n  path: b", "line 3: 'model.path' is given twice"),
        ("model: {path: a}\nseed: 1\nmodel: {dtype: float32}", "line 3: 'model' is given twice"),
        ("seed: 1\n'seed': 1", "line 2: 'seed' is given twice"),
        ("{seed: 1, seed: 1}", "line 1: 'seed' is given twice"),
        ("data: {train_size: 1,\n train_size: 1}", "line 2: 'data.train_size' is given twice"),
        ("model: [path, x]", "line 1: 'model' is a section and must have keys such as model.path"),
        ("model:\n- path: x", "'model' is a section"),
        ("objective: ~", "'objective' is a section"),
        ("model: x", "'model' is a section"),
        ("model:", "'model' is a section"),
        ("model: !!set {path}", "'model' must not have a YAML tag"),
        ("model:\n\tpath: x", "line 2 is not valid YAML: a tab stands where YAML permits only spaces"),
        ("\tseed: 1", "line 1 is not valid YAML: a tab"),
        ("seed: 1\n---\nseed: 2", "line 2 is not valid YAML: a second document begins here"),
        ("seed: 1\n...\n---\nseed: 2", "a second document begins here"),
        ("seed: *other", "line 1 is not valid YAML: found undefined alias"),
        ("model: &m {path: *m}", "model.path must be text, not a section"),
        ("? [seed]\n: 1", "a key must be the name of a setting"),
        ("1: x", "unknown key '1'"),
        ("null: x", "unknown key 'null'"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("seed: [1]", "seed must be an integer, not a list"),
        ("seed: {a: 1}", "seed must be an integer, not a section"),
        (
            "objective:\n  influence_clip: [1, [2]]",
            "line 2: objective.influence_clip must be a number, not a list",
        ),
        ("objective: {influence_clip: [1, null]}", "objective.influence_clip must be a number, not null"),
        (
            "objective: {influence_clip: 1}",
            "objective.influence_clip must be a list of 2 values, each a number or null",
        ),
        ("model: {path: '???'}", "no value for model.path"),
        ("seed: ???", "seed must be an integer; ??? marks a value that is still to be given"),
        ("run_dir: ${model.path}/x", "run_dir must not refer to other values"),
        ("- seed", "must be a mapping"),
        ("seed", "must be a mapping"),
        ("a\x00b: 1", "is not a text file"),
        ("[" * 2000, "nested too deeply"),
        (f"{'long' * 100}: 1", "longl...'; keys here are: model, parallel"),
    ],
)
def test_a_wrong_file_is_explained_in_one_line(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", newline="")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml", ["run_dir=r"])
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "c.yaml"))
    assert len(str(error.value).splitlines()) == 1
