"""The proof that the Ray cluster is the job's allocation, on lists of members."""

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.exit_codes import LOST
from megatron_fipo.network import LOOPBACK, free_port
from megatron_fipo.node.joined import Member, check_members, main, missing
from megatron_fipo.node.nodes import (
    add_bad_nodes,
    bad_nodes,
    failure,
    last_line,
    node_log,
    read_failures,
)

ONE, TWO = Member("n1", "10.0.0.1", 8, 8), Member("n2", "10.0.0.2", 8, 8)


def test_missing_nodes_are_named_in_order():
    assert missing(["n1", "n2", "n3"], [TWO]) == ["n1", "n3"]


def test_the_nodes_of_the_job_are_accepted():
    check_members(["n1", "n2"], [TWO, ONE])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([ONE, TWO, Member("x", "10.0.0.3", 8, 8)], "3 nodes have joined Ray, and the job has 2; not of the job: x"),
        ([ONE, TWO, TWO], "3 nodes have joined Ray, and the job has 2; not of the job: none"),
        ([ONE, Member("n2", "10.0.0.1", 8, 8)], "the nodes n1 and n2 have both the address 10.0.0.1"),
        ([ONE, Member("n2", "10.0.0.2", 8, 7)], "different numbers of GPUs: 7 on n2; 8 on n1"),
    ],
)  # fmt: skip
def test_other_clusters_are_refused(found, message):
    with pytest.raises(UserError, match=message):
        check_members(["n1", "n2"], found)


def test_a_failure_of_a_node_is_read_among_what_srun_writes(tmp_path):
    assert read_failures(tmp_path) == {}
    lines = [
        "srun: warning",
        failure("n1", 86, "Ray ended with 1:\n port 8 taken"),
        "srun: error: n1: task 0",
    ]
    (tmp_path / "other-nodes.log").write_text("\n".join(lines))
    (tmp_path / "first-node.log").write_text(failure("n0", 2, "no disk") + "\n")
    assert read_failures(tmp_path) == {"n0": (2, "no disk"), "n1": (86, "Ray ended with 1: port 8 taken")}


def test_the_last_line_of_a_node(tmp_path):
    assert last_line(tmp_path, "n1") == "it has logged nothing"
    (tmp_path / "nodes").mkdir()
    node_log(tmp_path, "n1").write_text("first\n last \n\n")
    assert last_line(tmp_path, "n1") == "last"


def test_bad_nodes_are_collected_once_each(tmp_path):
    assert bad_nodes(tmp_path) == []
    add_bad_nodes(tmp_path, ["n2", "n1"])
    add_bad_nodes(tmp_path, ["n2"])
    assert bad_nodes(tmp_path) == ["n1", "n2"]


def test_no_node_is_blamed_for_a_head_that_is_gone(tmp_path, capsys):
    address = f"{LOOPBACK}:{free_port(LOOPBACK)}"
    code = main(["--logs", str(tmp_path), "--address", address, "--timeout", "600", "--lost", "node1"])
    assert code == LOST
    assert f"Ray's head at {address} does not answer" in capsys.readouterr().err
    assert not (tmp_path / "bad-nodes").exists()
