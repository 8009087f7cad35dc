"""Programs of `experiments` run within this process, which has JAX loaded already."""

import contextlib
import io
import pathlib
import runpy
import sys
from typing import NamedTuple

import pytest
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self):
        return self.out.rstrip("\n").rsplit("\n", 1)[-1]


def run(program, *arguments):
    """`python -m experiments.PROGRAM ARGUMENTS` within this process."""
    app.define_help_flags()
    before, out, err, code = set(flags.FLAGS), io.StringIO(), io.StringIO(), 0
    command = [f"experiments/{program}.py", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.chdir(ROOT)
        try:
            runpy.run_module(f"experiments.{program}", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write("" if end.code is None or isinstance(end.code, int) else f"{end.code}\n")
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    return Ended(code, out.getvalue(), err.getvalue())
