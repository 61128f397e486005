"""Items are used in order, one is made meanwhile, and no more than two exist."""

import threading
import weakref

import pytest

from megatron_fipo.trainer.one_ahead import one_ahead


class Item:
    def __init__(self, index: int) -> None:
        self.index = index


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_next_item_is_made_while_one_is_in_use_and_no_other_exists(count):
    """`use` would wait in vain if it did not run beside the next `make`."""
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    begun = [threading.Event() for _ in range(count)]
    most = 0

    def make(index: int) -> Item:
        nonlocal most
        item = Item(index)
        alive.add(item)
        most = max(most, len(alive))
        begun[index].set()
        return item

    def use(index: int, item: Item) -> int:
        assert item.index == index
        assert begun[min(index + 1, count - 1)].wait(timeout=60)
        return index**2

    assert one_ahead(make, use, count) == [index**2 for index in range(count)]
    assert most == min(count, 2)
    assert len(alive) == 0


@pytest.mark.parametrize("failing", ["make", "use"])
def test_an_error_ends_it(failing):
    used = []

    def make(index: int) -> int:
        if failing == "make" and index == 2:
            raise ValueError("item 2 cannot be made")
        return index

    def use(index: int, item: int) -> None:
        used.append(index)
        if failing == "use" and index == 1:
            raise ValueError("item 1 cannot be used")

    with pytest.raises(ValueError, match="cannot be"):
        one_ahead(make, use, 5)
    assert used == [0, 1]
