"""What every run tries of a matrix: each value of each list, and no more than it must."""

from __future__ import annotations

from itertools import product

import pytest

from tests.covering import covering

LISTS = [(("a", "b", "c", "d"), (1, 2), (3, 4)), (("a", "b"), (1, 2, 3), (4, 5)), (tuple("abcdefg"), (1, 2, 3))]


@pytest.mark.parametrize("lists", LISTS, ids=["as many", "fewer names", "more names"])
def test_each_value_is_tried_and_the_rest_is_left_for_another_run(lists: tuple[tuple[object, ...], ...]) -> None:
    made = covering(*lists)
    assert [p.values for p in made] == list(product(*lists))
    soon = [p.values for p in made if not p.marks]
    rests = len(made) // len(lists[0])
    assert len(soon) == max(len(lists[0]), rests)
    assert all({values[i] for values in soon} == set(lists[i]) for i in range(len(lists)))
    assert len({values[1:] for values in soon}) == rests
    assert len({p.id for p in made}) == len(made)


def test_more_may_be_asked_for() -> None:
    made = covering(("a", "b"), (1, 2), also=[("a", 2)])
    assert [p.values for p in made if not p.marks] == [("a", 1), ("a", 2), ("b", 2)]
