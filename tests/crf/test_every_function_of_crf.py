"""Every public function of this room over forms, sizes, channels, classes and types, at extremes, and with what does not fit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crf_functions import EVERY, FORMS, NUMBERS, PARTS, PICTURES, SCALES, SIZES, arrays_of, params_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lcrf_jax import crf

pytestmark = pytest.mark.slow
KINDS = ("nan", "inf", "-inf", "negative", "huge", "batch", "flat", "channels first", "empty", "words", "one more", "complex")
IN_VALUE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "negative": -1.0, "huge": 3e38}


def spoilt(array, kind, position):
    """An array with one value, or with a shape, that it must not have."""
    if kind in IN_VALUE:
        array = np.array(array)
        if array.dtype != np.uint8:
            with np.errstate(over="ignore"):
                array.reshape(-1)[position % array.size] = IN_VALUE[kind]
        return array
    other = {
        "batch": lambda: array[None], "flat": lambda: array.reshape(-1), "channels first": lambda: array.transpose(2, 0, 1),
        "empty": lambda: array[:0], "words": lambda: np.full(array.shape, "a"),
        "one more": lambda: np.concatenate([array, array[:1]]), "complex": lambda: array.astype(np.complex64),
    }
    return other[kind]()


@functools.cache
def program(name, form):
    """The function in one program, which serves every picture of a size."""
    return jax.jit(lambda params, *arrays: EVERY[name].function(*arrays, form, params))


def values_of(result):
    """The leaves that are numbers of pixels: not the tables of a lattice, whose unused places hold anything."""
    return [leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_no_public_function_is_left_out():
    assert set(crf.__all__) == set(EVERY) | PARTS


def form_of(name, size):
    """One form for each size, as a form and a size take seconds to compile: the functions take turns, so that each has every
    size and every form, and each pair of these has several functions."""
    of_forms = [other for other in EVERY if EVERY[other].of_forms]
    return FORMS[(SIZES.index(size) + of_forms.index(name)) % len(FORMS)] if name in of_forms else "exact"


def test_every_size_has_every_form_in_some_function():
    pairs = {(size, form_of(name, size)) for name in EVERY if EVERY[name].of_forms for size in SIZES}
    assert pairs == set(itertools.product(SIZES, FORMS))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    size=st.sampled_from(SIZES), picture=st.sampled_from(PICTURES), scale=st.sampled_from(SCALES), seed=st.integers(0, 99),
    numbers=st.sampled_from(NUMBERS), kind=st.one_of(st.none(), st.sampled_from(KINDS)), position=st.integers(0, 9999),
)
def test_finite_or_an_error_that_says_why(name, size, picture, scale, seed, numbers, kind, position):
    """Finite, or an error that says what was expected; NaN never goes in unnoticed, and what is right is not refused."""
    function, names, _ = EVERY[name]
    form = form_of(name, size)
    params = params_of(size, numbers)
    arrays = arrays_of(size, picture, scale, seed)
    if kind is not None:
        array = names[position % len(names)]
        arrays[array] = spoilt(arrays[array], kind, position // len(names))
        try:
            # Arguments are looked at before the form, whose trace takes long.
            jax.eval_shape(lambda: function(*(arrays[each] for each in names), "exact", params))
        except (ValueError, TypeError) as error:
            assert "expected" in str(error), f"{name} does not say what it expects: {error}"
            return
        assert not (kind == "nan" and np.isnan(np.asarray(arrays[array], np.float32)).any()), f"{name} takes NaN in {array}"
        if kind not in IN_VALUE:
            return
    if kind == "huge" and name in ("filter_exact", "filter_symmetric", "filter_with", "feature_kernel"):
        return  # sums of it, or it in units of a width, are beyond float32
    if name in ("refine", "refined_posterior") and size.classes == 1:
        with pytest.raises(ValueError, match="expected at least two classes, got one"):
            program(name, form)(params, *(arrays[each] for each in names))
        return
    result = program(name, form)(params, *(arrays[each] for each in names))
    for leaf in values_of(result):
        assert not np.isnan(np.asarray(leaf, np.float64)).any(), f"{name} gives NaN"
