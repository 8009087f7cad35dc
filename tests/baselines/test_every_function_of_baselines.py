"""Every public function of this room, with every type, at extremes, and with what does not fit."""

import pytest
from every_function import BASELINES, KINDS, SCALES, SIZES, check_property, check_types
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

EXAMPLES = {
    "size": st.integers(0, len(SIZES) - 1),
    "scale": st.integers(0, len(SCALES) - 1),
    "seed": st.integers(0, 99),
    "kind": st.one_of(st.none(), st.sampled_from(KINDS)),
    "position": st.integers(0, 9999),
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_type_is_taken(name):
    check_types(name)


@pytest.mark.parametrize("name", [name for name, call in BASELINES.items() if not call.loops])
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(size=st.just(3), **{name: values for name, values in EXAMPLES.items() if name != "size"})
def test_finite_or_an_error_that_says_why(name, size, scale, seed, kind, position):
    check_property(name, size, scale, seed, kind, position)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
@given(**EXAMPLES)
def test_finite_or_an_error_that_says_why_at_length(name, size, scale, seed, kind, position):
    check_property(name, size, scale, seed, kind, position)
