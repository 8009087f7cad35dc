"""What runs have to do with the machine: other processes, signals, locks, the disk, the terminal.

`processes` says who is first of several and what all agree on, `gpus` which GPUs of a host are whose; `signals` notes that a
run is to end between two steps; `locks` keeps two runs out of one folder; `files` writes a file whole or not at all
and reads JSON; `cache`
keeps arrays on disk between runs, `checksums` sees what a disk has changed in them, `entries` says what lies there and bounds
it, and `contents` knows files by what they hold;
`compilation` keeps compiled programs; `progress` is what a run shows while it works; `errors` tells what users can mend from
faults of the house.

The room knows nothing of images or networks. It imports the standard library, jax, numpy and tqdm.
"""
