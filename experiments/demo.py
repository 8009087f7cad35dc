r"""A page on this machine where one drops a photograph and sees its mask.

    pip install '.[train,demo]'
    python -m experiments.demo --checkpoint=RUN
    python -m experiments.demo --checkpoint=animals --examples=PHOTOGRAPHS

The first serves a run of yours, the second the model that comes with the package. Then open http://127.0.0.1:8000. Nothing but
this machine can reach the page unless --host says otherwise; there is no password, so choose another host only in a network that
you trust. Photographs stay in memory and are not kept.

The page answers to numerical addresses, to localhost and, with --host=0.0.0.0, to the names of this machine. Where it is
called by another name, of a proxy perhaps, --allow_host=NAME admits that.
"""

import contextlib

from absl import flags

from lcrf_jax.machine.progress import say
from lcrf_jax.predict.model import trained

from . import photograph_page, photograph_server, reporting

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, a file of a model, or the name of one that is shipped.")
_EXAMPLES = flags.DEFINE_string("examples", "", "Folder of photographs; the page offers the first six to everybody who sees it.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets everybody in the network in.")
_ALLOW_HOST = flags.DEFINE_multi_string("allow_host", [], "A name that the page may be called by; may be given several times.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_MAX_MEGABYTES = flags.DEFINE_integer("max_megabytes", 20, "Largest upload.", lower_bound=1, upper_bound=1000)
_MAX_MEGAPIXELS = flags.DEFINE_integer("max_megapixels", 40, "Largest photograph.", lower_bound=1, upper_bound=160)


def main(argv):
    """Load the run and serve the page until Ctrl-C."""
    reporting.no_more_arguments(argv)
    try:
        import flask  # noqa: F401 - told before the network is loaded
    except ImportError as error:
        raise ValueError(f"the page needs Flask, which is not installed ({error}); pip install '.[demo]' in your clone") from error
    photograph_server.own_names(_HOST.value, _ALLOW_HOST.value)
    with photograph_server.listening(_HOST.value, _PORT.value) as listener:  # what is wrong is told at once
        max_bytes, max_pixels = _MAX_MEGABYTES.value * 1_000_000, _MAX_MEGAPIXELS.value * 1_000_000
        examples = photograph_page.examples_of(_EXAMPLES.value, max_bytes=max_bytes, max_pixels=max_pixels)
        say("loading the network")
        description, params = trained(_CHECKPOINT.value)
        labeller = photograph_page.Labeller(description, params, max_pixels)
        app = photograph_server.make_app(
            labeller, max_bytes=max_bytes, host=_HOST.value, allowed=_ALLOW_HOST.value, examples=examples
        )
        server = photograph_server.make_server(app, listener)
        addresses = photograph_server.addresses(_HOST.value, listener.getsockname()[1])
        say(f"open {' or '.join(addresses)}    (Ctrl-C ends it)")
        with contextlib.closing(server.socket):
            server.serve_forever()


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    reporting.run(main)
