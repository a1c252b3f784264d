"""From best counts at a few sizes to the law: what `find` puts into a plan."""

from __future__ import annotations

import pytest

from testreg.finding.sizes import Size, law, least_between
from testreg.finding.trial import Score
from testreg.runtime.law import Law


def size(patches: int, best: int, others: tuple[int, ...] = ()) -> Size:
    """Measured at so many patches, where `best` drifts by .001 and all others by .1."""
    tried = {count: Score(0.0, 0.9, 1.0, 1.0) for count in others} | {best: Score(0.0, 0.999, 1.0, 1.0)}
    return Size((0, 0), patches, 4, 1.0, 0.02, tried, best)


@pytest.mark.parametrize(("registers", "patches", "sizes", "counts"), [
    (4, 196, [size(100, 3, (4,)), size(784, 14, (4,))], {100: 3, 196: 4, 400: 7, 784: 14}),
    (4, 144, [size(64, 3, (4,)), size(576, 40, (4,))], {64: 3, 144: 4, 576: 40}),  # steep above
    (4, 196, [size(784, 14, (4,))], {50: 2, 196: 4, 784: 14}),
    (4, 196, [size(100, 2, (4,))], {100: 2, 196: 4, 292: 6}),
    (2, 196, [size(100, 1, (2,)), size(784, 1, (2,))], {100: 1, 196: 2, 784: 1}),
    (4, 196, [size(100, 4), size(784, 4)], {1: 4, 100: 4, 784: 4}),
    (4, 196, [size(400, 8, (4,)), size(784, 16, (4,))], {196: 4, 400: 8, 784: 16}),
])  # fmt: skip
def test_the_law_meets_what_was_measured(registers, patches, sizes, counts):
    found = law(registers, patches, sizes)
    assert {at: found(at) for at in counts} == counts
    assert found.fewest == min(patches, *(one.patches for one in sizes))
    assert found.most == max(patches, *(one.patches for one in sizes))
    assert Law.from_dict(found.to_dict()) == found


def test_where_nothing_was_measured_there_is_no_law():
    assert law(4, 196, []) is None


def test_the_least_of_a_parabola():
    def drifts(of):
        return {count: Score(0.0, 1 - of(count), 1.0, 1.0) for count in (12, 14, 16)}

    assert least_between(14, 2, drifts(lambda count: 0.001 + 0.0001 * (count - 13.2) ** 2)) == pytest.approx(13.2)
    assert least_between(14, 2, drifts(lambda count: 0.001 + 0.0001 * (count - 19) ** 2)) == 15  # half a step at most
    assert least_between(14, 2, {14: Score(0.0, 0.9, 1.0, 1.0)}) == 14
