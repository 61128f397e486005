"""The learning rate of an iteration."""

from megatron_fipo.driver.loop import learning_rate


def test_the_learning_rate_rises_over_the_warm_up_and_then_stays():
    assert [learning_rate(1.0, iteration, 4) for iteration in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(3e-4, 0, 0) == 3e-4
