r"""A page on this machine where one drops a photograph and sees its mask.

    pip install '.[train,demo]'
    python -m experiments.demo --checkpoint=RUN

Then open http://127.0.0.1:8000. Nothing but this machine can reach the page unless --host says otherwise; there is no
password, so choose another host only in a network that you trust. Photographs stay in memory and are not kept.
"""

import contextlib

from absl import flags

from experiments import photograph_page, reporting
from lcrf_jax.machine.progress import say

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets everybody in the network in.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_MAX_MEGABYTES = flags.DEFINE_integer("max_megabytes", 20, "Largest upload.", lower_bound=1)
_MAX_MEGAPIXELS = flags.DEFINE_integer("max_megapixels", 40, "Largest photograph.", lower_bound=1)


def main(argv):
    """Load the run and serve the page until Ctrl-C."""
    reporting.no_more_arguments(argv)
    try:
        import flask  # noqa: F401 - told before the network is loaded
    except ImportError as error:
        raise ValueError(f"the page needs Flask, which is not installed ({error}); pip install '.[demo]' in your clone") from error
    _, description, params = reporting.load_segmenter(_CHECKPOINT.value)
    labeller = photograph_page.Labeller(description, params, _MAX_MEGAPIXELS.value * 1_000_000)
    server, address = photograph_page.make_server(
        labeller, host=_HOST.value, port=_PORT.value, max_bytes=_MAX_MEGABYTES.value * 1_000_000
    )
    say(f"open {address}    (Ctrl-C ends it)")
    with contextlib.closing(server.socket):
        server.serve_forever()


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    reporting.run(main)
