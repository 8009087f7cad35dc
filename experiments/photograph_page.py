"""A page where one drops a photograph and sees its mask: the network behind it, the requests, and the server."""

import io
import threading

import numpy as np
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.images import opened_as_rgb
from lcrf_jax.pictures.palette import index_picture, overlay, palette
from lcrf_jax.pictures.report import data_url, templates
from lcrf_jax.predict.refinement import adjustable_refinement
from lcrf_jax.predict.resizing import class_statistics, labels_and_confidence, working_size
from lcrf_jax.predict.segmenter import make_segmenter, segment

SLIDER = ("name", "title", "least", "greatest", "step")
# Of the refinement, each with what SLIDER names.
SLIDERS = (
    ("bilateral_weight", "weight of position and colour", 0.0, 20.0, 0.5),
    ("bilateral_position_width", "width of position, pixels", 5.0, 160.0, 5.0),
    ("bilateral_colour_width", "width of colour", 2.0, 60.0, 1.0),
    ("gaussian_weight", "weight of position alone", 0.0, 20.0, 0.5),
    ("unary_weight", "weight of the network", 0.1, 5.0, 0.1),
    ("num_iterations", "iterations of mean field", 5, 20, 5),
)


class Refused(ValueError):
    """A request that cannot be done; the message is for the person at the page."""


def slider_defaults(inference):
    """The value of each slider in the settings of a run."""
    return {name: inference.get(name, inference["kernel"].get(name)) for name, *_ in SLIDERS}


def slider_values(given):
    """The values of sliders that were moved.

    Args:
      given: dict from a slider's name to text; other names are left out.

    Returns:
      dict from name to number.

    Raises:
      Refused: if a value is no number or out of range.
    """
    values = {}
    for name, title, least, greatest, _ in SLIDERS:
        if name in given:
            try:
                value = float(given[name])
            except ValueError:
                value = float("nan")
            if not least <= value <= greatest:
                raise Refused(f"{title}: expected {least:g} to {greatest:g}, got {given[name][:20]!r}")
            values[name] = round(value) if name == "num_iterations" else value
    return values


class Labeller:
    """A trained network behind a lock: one photograph at a time.

    Args:
      description: of the run.
      params: its parameters.
      max_pixels: larger photographs are refused.
    """

    def __init__(self, description, params, max_pixels):
        self.description, self._max_pixels = description, max_pixels
        self.class_names = tuple(description["class_names"])
        self._segmenter, self._lock = make_segmenter(description, params), threading.Lock()
        self.label(np.zeros((64, 64, 3), np.uint8), {}, crf=False, tags=None)  # compiles what is the same for all sizes

    def photograph(self, content):
        """[H, W, 3] uint8 of an uploaded file.

        Args:
          content: bytes of the file.

        Returns:
          The photograph.

        Raises:
          Refused: if it is none, or too large.
        """
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > self._max_pixels:
                    raise Refused(
                        f"the photograph has {image.width} x {image.height} pixels; at most "
                        f"{self._max_pixels / 1e6:.0f} million are taken here: scale it down, "
                        "or use experiments.predict"
                    )
                return opened_as_rgb(image, "the photograph")[0]
        except Refused:
            raise
        except Exception as error:  # decoders raise errors of every kind
            raise Refused("this is no photograph that can be read: send a JPEG, PNG, WebP, BMP or TIFF file") from error

    def label(self, image, given, *, crf, tags):
        """(labels, confidence) of a photograph.

        Args:
          image: [H, W, 3] uint8.
          given: dict from the name of a slider that was moved to text.
          crf: whether to refine.
          tags: names of the classes that may occur, or None.

        Returns:
          ([H, W] uint8, [H, W] float16).
        """
        values = slider_values(given)
        try:
            present = None if tags is None else tag_vector(tags, self.class_names)
        except ValueError as error:
            raise Refused(str(error)) from error
        segmenter = self._segmenter
        if values:
            shape = working_size(image.shape[:2], segmenter.max_side)
            segmenter = segmenter._replace(refine=adjustable_refinement(self.description["inference"], values, shape))
        with self._lock:
            result = segment(segmenter, image, crf=crf, tags=present)
        return labels_and_confidence(result.best_log_probs, result.size)


def answer(labeller, image, labels, confidence):
    """What the page shows: pictures as data URLs, and the classes with area and confidence."""
    names, colours = labeller.class_names, palette(len(labeller.class_names))
    counts, sums = class_statistics(labels, confidence, len(names))
    grey = Image.fromarray(np.uint8(np.round(255 * confidence.astype(np.float32))))
    return {
        "classes": [
            {"name": names[k], "colour": "#" + bytes(colours[k].tolist()).hex(), "area": float(counts[k] / labels.size),
             "confidence": float(sums[k] / counts[k])}
            for k in np.argsort(-counts) if counts[k]
        ],
        "photograph": data_url(Image.fromarray(image), "JPEG"),
        "overlay": data_url(Image.fromarray(overlay(image, labels)), "JPEG"),
        "mask": data_url(index_picture(labels), "PNG"),
        "confidence": data_url(grey, "JPEG"),
    }  # fmt: skip


def page(labeller):
    """The HTML of the page."""
    facts = {
        "sliders": [dict(zip(SLIDER, slider, strict=True)) for slider in SLIDERS],
        "values": slider_defaults(labeller.description["inference"]),
        "classes": list(labeller.class_names[1:]),
    }
    return templates(__package__).get_template("photograph_page.html.jinja").render(facts=facts)


def make_app(labeller, *, max_bytes, hosts):
    """The web application.

    Args:
      labeller: Labeller.
      max_bytes: largest upload.
      hosts: names by which the page may be called; None for all.

    Returns:
      flask.Flask.
    """
    import flask

    app = flask.Flask("lcrf_jax", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=max_bytes, TRUSTED_HOSTS=hosts)
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )

    @app.after_request
    def _headers(response):
        response.headers.update({
            "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        })  # fmt: skip
        return response

    @app.get("/")
    def _page():
        return page(labeller)

    @app.post("/segment")
    def _segment():
        if flask.request.headers.get("X-Requested-With") != "lcrf_jax":  # no form of another page can send it
            return {"error": "use the page"}, 403
        values = flask.request.args.to_dict()
        tags = flask.request.args.getlist("tag") or None
        try:
            image = labeller.photograph(flask.request.get_data())
            labels, confidence = labeller.label(image, values, crf=values.get("crf", "1") == "1", tags=tags)
        except Refused as error:
            return {"error": str(error)}, 400
        return answer(labeller, image, labels, confidence)

    @app.errorhandler(413)
    def _too_large(_):
        return {"error": f"the file is larger than {max_bytes / 1e6:.0f} MB; send a smaller one"}, 413

    return app


def make_server(labeller, *, host, port, max_bytes):
    """The server and its address, ready to `serve_forever`.

    Args:
      labeller: Labeller.
      host: address to listen on; on one of this machine the page answers to no other name.
      port: to listen on, 0 for a free one.
      max_bytes: largest upload.

    Returns:
      (server, address).
    """
    from werkzeug.serving import make_server as make_werkzeug_server

    hosts = ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else None
    app = make_app(labeller, max_bytes=max_bytes, hosts=hosts)
    server = make_werkzeug_server(host, port, app, threaded=True)
    return server, f"http://{host}:{server.server_port}"
