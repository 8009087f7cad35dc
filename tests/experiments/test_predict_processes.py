"""Processes of `predict` that know only their numbers."""

from programs import run

from lcrf_jax.machine import gpus


def test_processes_with_numbers_take_gpus_of_their_own(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(gpus, "take_own_gpus", lambda *numbers: taken.append(numbers))
    flags = (f"--checkpoint={tmp_path}", f"--images={tmp_path}", f"--out={tmp_path / 'out'}")
    assert run("predict", *flags, "--num_processes=8", "--process_id=3").code == 1 and taken == [(3, 8)]
    ended = run("predict", *flags, "--num_processes=8", "--process_id=8")
    assert ended.code == 1 and "--process_id: expected 0 to --num_processes - 1, got 8 of 8" in ended.err
    assert run("predict", *flags).code == 1 and taken == [(3, 8)]
