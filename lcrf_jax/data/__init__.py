"""From files to batches.

Read `example` first: what an image with tags is, and what a source of such images has to offer. `files` reads single
files, `sources` has one file for each kind of data, and `opening` is the one list of these kinds, `options` what each can be asked for, `parts` what a part of a split is. `check` looks at a whole
source before it is used, `sharding` writes one as shards. `views` cuts views out of an image, `pipeline` makes records of them and `loader` batches on the
devices, in an order that a resumed run repeats.

The room imports of the house `numerics`, the type of a record in `bound`, and `machine`.
"""
