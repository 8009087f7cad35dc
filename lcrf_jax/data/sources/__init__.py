"""The kinds of data, one file each: a source gives random access to examples, see `lcrf_jax.data.example`."""
