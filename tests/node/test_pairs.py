from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.node.preflight.pairs import opponents, tournament

PLAYERS = st.integers(min_value=1, max_value=65)


@given(PLAYERS)
def test_all_pairs_meet_once(players: int) -> None:
    met = [pair for pairs in tournament(players) for pair in pairs]
    assert sorted(met) == list(combinations(range(players), 2))


@given(PLAYERS)
def test_pairs_of_a_round_are_disjoint(players: int) -> None:
    for pairs in tournament(players):
        playing = [player for pair in pairs for player in pair]
        assert len(playing) == len(set(playing))


@given(PLAYERS)
def test_the_least_number_of_rounds(players: int) -> None:
    assert len(tournament(players)) == (players if players % 2 else players - 1)


@given(PLAYERS, st.data())
def test_opponents_agree(players: int, data: st.DataObject) -> None:
    player = data.draw(st.integers(0, players - 1))
    for number, opponent in enumerate(opponents(players, player)):
        if opponent is not None:
            assert opponents(players, opponent)[number] == player
