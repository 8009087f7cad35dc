"""Images in, masks out.

Read `segmenter` first: a trained network as a function of images of any size. `outputs` is what each method makes of its
network's output, `resizing` the way from the network's grid to pixels, `refinement` the dense CRF on top. `tiling` cuts
large pictures, `evaluation` scores masks, `model` is a trained run as one object (`lcrf_jax.load`), and `export` makes one
function and one file of it. `checks` refuses a description that no segmenter can be made of.

The room imports any other but `train`.
"""
