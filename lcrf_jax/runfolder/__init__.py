"""What a run leaves on disk: RUN/last and RUN/best, config.json, metrics.jsonl.

`checkpoints` saves and restores parameters and states, and is the only file that knows orbax; `digests` tells whether what
comes back is what was saved, `damage` what is lost and what could only not be read just now, and `placing` brings a saved state
to the devices. `description` is config.json: what a run is, beside its parameters. `segments` are its parts: what it was
trained with from which step on. `metrics` has its numbers. `compact` is a trained model as one small file without the frozen
backbone, and the models that come with the package.

The room imports of the house `machine` and, for the backbone of a small file, `nets`.
"""
