import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from jax.test_util import check_grads

from lcrf_jax import numerics
from lcrf_jax.numerics import check_finite, check_logits, check_number, check_shape, entropy, promote_float

entropy, promote_float = map(compiled, (entropy, promote_float))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "uint8", "bool", "float32"])
def test_everything_real_becomes_float32(dtype):
    promoted = promote_float(jnp.asarray([0, 1, 1], dtype))
    assert promoted.dtype == jnp.float32
    np.testing.assert_array_equal(promoted, [0, 1, 1])


def test_float64_stays_where_it_is_enabled():
    assert promote_float(np.float64([1.5])).dtype == jnp.float32
    with jax.enable_x64(True):
        assert promote_float(np.float64([1.5])).dtype == jnp.float64


def test_large_integers_keep_their_size():
    np.testing.assert_array_equal(numerics.promote_float(np.array([2**40, -(2**40), 3])), np.float32([2**40, -(2**40), 3]))


def test_complex_is_refused():
    with pytest.raises(ValueError, match="complex64"):
        promote_float(jnp.ones(2, jnp.complex64))


def test_entropy_equals_the_sum_in_float64():
    logits = np.random.default_rng(0).normal(size=(50, 7)) * 3
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(jax.jit(entropy)(logits), -(probs * np.log(probs)).sum(axis=1), rtol=1e-5, atol=1e-6)


def test_entropy_by_hand():
    np.testing.assert_allclose(entropy(jnp.zeros((2, 4))), np.log([4, 4]), rtol=1e-6)
    half_and_quarters = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(entropy(half_and_quarters), 1.5 * np.log(2), rtol=1e-6)


def test_entropy_does_not_see_a_shift_or_an_order():
    logits = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_allclose(entropy(logits + 7), entropy(logits), rtol=1e-4)
    np.testing.assert_allclose(entropy(logits[:, ::-1]), entropy(logits), rtol=1e-5)


def test_entropy_has_the_right_gradient():
    with jax.enable_x64(True):
        check_grads(jax.jit(entropy), (np.random.default_rng(2).normal(size=(3, 4)),), order=2)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, -np.inf, 3.0], [5.0]])
def test_entropy_survives_extremes_in_value_and_gradient(logits):
    value, gradient = jax.value_and_grad(entropy)(jnp.array(logits, jnp.float32))
    assert 0 <= value <= np.log(len(logits)) + 1e-6
    assert np.all(np.isfinite(gradient))


def test_vmap_equals_a_loop():
    logits = np.random.default_rng(3).normal(size=(4, 6, 3))
    np.testing.assert_array_equal(jax.vmap(entropy)(logits), jnp.stack([entropy(x) for x in logits]))


def test_a_wrong_shape_is_told_with_what_to_do():
    assert check_shape("x", np.ones((2, 5)), ("m", 5), "transpose it") == (2, 5)
    for shape in [(5, 2), (2, 5, 1), (0, 5), ()]:
        with pytest.raises(ValueError, match=r"x: expected shape \[m, 5\], got .*; transpose it"):
            check_shape("x", np.ones(shape), ("m", 5), "transpose it")
    with pytest.raises(ValueError, match="classes last"):
        entropy(1.0)


def test_a_number_out_of_range_is_told_with_what_to_do():
    assert check_number("n", 3, minimum=0, remedy="use more") == 3
    for bad in [-1, np.float32(-0.5), float("nan"), float("inf")]:
        with pytest.raises(ValueError, match="n: expected a finite number >= 0, got .*; use more"):
            check_number("n", bad, minimum=0, remedy="use more")
    with pytest.raises(ValueError, match="> 0, got 0"):
        check_number("n", 0, minimum=0, strict=True, remedy="use more")
    assert check_number("n", 2.0, minimum=0, whole=True, remedy="use more") == 2
    with pytest.raises(ValueError, match="n: expected a whole number, got 2.5; use more"):
        check_number("n", 2.5, minimum=0, whole=True, remedy="use more")
    jax.jit(lambda n: check_number("n", n, minimum=0, remedy="use more"))(-1.0)


def test_numbers_that_only_float64_holds_are_refused_where_it_is_not_enabled():
    logits = np.array([[0.0, -1e300], [1e300, 0.0]])
    with pytest.raises(ValueError, match=r"x: expected numbers within .* got 1e\+300 at \[1, 0\]; scale them, or switch on jax_enable_x64"):
        check_logits("x", logits)
    with pytest.raises(ValueError, match=r"x: .* got -1e\+300 at \[0, 1\]"):
        check_finite("x", logits[:1].tolist(), "look")
    with pytest.raises(ValueError, match=r"x: .* got -1e\+300 at \[0, 0\]"):
        check_logits("x", np.full((1, 2), -1e300))
    check_logits("x", logits[:1])  # a class that is impossible
    check_finite("x", np.float64([np.finfo(np.float32).max]), "look")
    with jax.enable_x64(True):
        check_logits("x", logits)
        check_finite("x", logits, "look")


@pytest.mark.parametrize(("array", "error", "message"), [
    (np.ma.array([[1.0]], mask=[[True]]), TypeError, r"expected an array without a mask, .*\.filled\(0\)"),
    (np.array([[None]]), TypeError, "expected real numbers, got object; convert them first"),
    (np.array([["a"]]), TypeError, "expected real numbers, got <U1"),
    (np.ones((1, 1), complex), ValueError, "expected real numbers, got complex128; take their real part"),
    (np.zeros((1, 1), "M8[s]"), TypeError, r"expected real numbers, got datetime64\[s\]"),
])
def test_what_holds_no_real_numbers_is_told_by_name(array, error, message):
    for check in (lambda: check_shape("x", array, ("m", "K"), "give it"), lambda: check_finite("x", array, "look"),
                  lambda: numerics.promote_float(array, name="x")):  # fmt: skip
        with pytest.raises(error, match="x: " + message):
            check()
    if error is TypeError and not np.ma.isMaskedArray(array) and array.dtype.kind != "M":
        with pytest.raises(error, match="x: " + message):
            check_finite("x", array.tolist(), "look")


@pytest.mark.parametrize("kind", [">f2", ">f4", ">f8", ">i2", ">i4", ">i8", ">u2"])
def test_the_other_byte_order_is_no_other_number(kind):
    values = np.arange(6).reshape(2, 3).astype(kind)
    np.testing.assert_array_equal(numerics.native(values), values)
    assert numerics.native(values).dtype.isnative
    np.testing.assert_array_equal(numerics.promote_float(values), np.arange(6.0).reshape(2, 3))
    assert numerics.native([1, 2]) == [1, 2] and numerics.native(None) is None
