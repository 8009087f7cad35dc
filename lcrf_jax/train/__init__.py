"""From a configuration to a trained run.

Read `methods` first: what each of the compared methods minimises and what it needs. `plan` is what a configuration
means before anything is computed, `settings` refuses what cannot be, and `beginning` what does not fit the folder of the run.
`splits` opens the data, `features`, `class_maps` and `cues` compute what does not
change in training, by all devices (`spread`), `keeping` chooses what of it lies on the disk, and `preparation` calls them. `step` is one step of the optimiser over a mesh of devices,
`posteriors` makes the labels of the next round, `linear_round` those of a linear network before the first, `evidence` says which of
them a round learns from and keeps them, and `fit` is the loop with checkpoints, validation,
resuming and ending on a signal.

The room may import any other; none imports it but the programs in `experiments`.
"""
