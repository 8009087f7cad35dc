"""Every public function of this room, with every type, at extremes, and with what does not fit."""

import pytest
from every_function import BASELINES, EXAMPLES, check_property, check_types
from hypothesis import Phase, given, settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", BASELINES)
def test_every_type_is_taken(name):
    check_types(name)


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
@given(**EXAMPLES)
def test_finite_or_an_error_that_says_why(name, size, scale, seed, kind, position):
    check_property(name, size, scale, seed, kind, position)
