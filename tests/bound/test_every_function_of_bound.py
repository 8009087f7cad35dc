"""Every public function of this room, with every type, at extremes, and with what does not fit."""

import pytest
from every_function import BOUND, EVERY, EXAMPLES, check_property, check_types, public_functions
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow


def test_no_public_function_is_left_out():
    assert public_functions() == {name.split(",")[0] for name in EVERY}


@pytest.mark.parametrize("name", BOUND)
def test_every_type_is_taken(name):
    check_types(name)


@pytest.mark.parametrize("name", [name for name, call in BOUND.items() if not call.loops])
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(size=st.just(3), **{name: values for name, values in EXAMPLES.items() if name != "size"})
def test_finite_or_an_error_that_says_why(name, size, scale, seed, kind, position):
    check_property(name, size, scale, seed, kind, position)


@pytest.mark.parametrize("name", BOUND)
@settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
@given(**EXAMPLES)
def test_finite_or_an_error_that_says_why_at_length(name, size, scale, seed, kind, position):
    check_property(name, size, scale, seed, kind, position)
