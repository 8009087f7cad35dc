r"""What energy and mean field ask of a kernel, and what a form of the bilateral Gaussian has to be able to do.

A dense CRF meets its kernel only in products with values of the pixels. What `lcrf_jax.crf.inference` needs of a kernel
is

* `splat(values [m, K])`: whatever the form sums up first, a pytree of arrays with K columns;
* `blur(splatted)`: the kernel between those sums, symmetric, of the same structure;
* `slice(blurred)`: the result at the pixels [m, K]. `slice(blur(splat(values)))` is the symmetric part of the
  kernel times the values, self-pairs left out, and `slice` is the transpose of `splat`;
* `apply(values, backwards=False)`: the kernel itself times the values, self-pairs left out; faster than the
  symmetric part where the form is not symmetric of itself. Such a form has two orders to work in, and `backwards`,
  which may be traced, takes the second. Without row normalisation each is the transpose of the other.

A class with these is a `Kernel`: `DenseKernel` for a matrix, `ImageKernel` for the two Gaussians of an image. Its
bilateral one takes one of three forms, `ExactGaussian`, `Anchors` and `Lattice` of `lcrf_jax.crf.exact`, `anchors` and
`lattice`. Each is a `BilateralForm`: it has these four methods *with* self-pairs, and some more:

* `diagonal()`: the self-pairs [m];
* `scaled(scale [m])`: the form of diag(s) K diag(s);
* `row_sums(counted [m])`: the sums of its rows over the pixels that count, which normalise it;
* `overflowed()`: whether it had too little room for this image, so that its results mean nothing; `cleared` takes that
  sign away;
* `kept()`: the form for many products, with what each would compute anew in memory, where that is little;
* `nonnegative` and `has_two_orders`, properties: whether no entry of it can be below 0, and whether `backwards` makes a
  difference.

A kernel may also have `overflowed`, `without_overflow`, `largest_row_sums`, `signed` and `kept`, as `ImageKernel` has: with the
first two mean field falls back to the unary, with the third it can drop labels, and with the last its products are faster. A kernel whose class is a pytree of JAX
may be passed through jit and vmap; any other object works as well, where JAX need not look into it.

`lcrf_jax.crf.image_kernels` builds them.
"""

from typing import Any, Protocol, Self, runtime_checkable

import jax
from jax.typing import ArrayLike


@runtime_checkable
class Kernel(Protocol):
    """A pairwise kernel between m pixels, as energy and mean field ask for it; see the module."""

    def splat(self, values: ArrayLike) -> Any:
        """The sums of values [m, K] that `blur` needs, a pytree of arrays with K columns."""
        ...

    def blur(self, splatted: Any) -> Any:
        """The symmetric part of the kernel between those sums; of the same structure."""
        ...

    def slice(self, blurred: Any) -> jax.Array:
        """What `blur` returns, at the pixels [m, K]; the transpose of `splat`."""
        ...

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], in the second of its two orders if `backwards`."""
        ...


class BilateralForm(Kernel, Protocol):
    """A form of the bilateral Gaussian: its four products have the self-pairs in them."""

    def diagonal(self) -> jax.Array:
        """The self-pairs [m]."""
        ...

    def scaled(self, scale: ArrayLike) -> Self:
        """The form of diag(s) K diag(s), for factors s [m]."""
        ...

    def row_sums(self, counted: jax.Array) -> jax.Array:
        """The sums [m] of its rows over the pixels that count: [m], 1 for these and 0 for others."""
        ...

    def overflowed(self) -> jax.Array:
        """Whether it had too little room for this image."""
        ...

    def cleared(self, overflowed: jax.Array) -> Self:
        """This form, such that it does not say so any more if `overflowed`."""
        ...

    def kept(self) -> Self:
        """This form for many products, with what each would compute anew in memory, where that is little."""
        ...

    @property
    def has_two_orders(self) -> bool:
        """Whether `backwards` makes a difference."""
        ...

    @property
    def nonnegative(self) -> bool:
        """Whether no entry can be below 0."""
        ...
