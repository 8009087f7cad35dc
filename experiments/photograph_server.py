"""The server of the page for single photographs: who may call it, how, and errors that the page can show.

A page elsewhere in the same browser must not reach it. So it answers only to names of its own (a name of somebody else's
may be made to point here) and takes photographs only from its own page.
"""

import ipaddress
import logging
import os
import re
import socket
import urllib.parse

from .photograph_page import Refused, page

OWN_HEADER = ("X-Requested-With", "lcrf_jax")
EVERYWHERE = ("0.0.0.0", "::", "")
SECONDS_TO_SEND = 60
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w-]+(?:\.[\w-]+)*)\.?(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_PORTS = {"http": ":80", "https": ":443"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
_MESSAGES = {
    400: "the request is not understood, or was cut off; send it again",
    404: "there is nothing at this address; the page is at /, photographs go to /segment",
    405: "the page is read by GET from /, photographs are sent by POST to /segment",
}
_log = logging.getLogger(__name__)


def is_address(name):
    """Whether a name is a numerical address, IPv4 or IPv6 without brackets."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names(host, allowed):
    """The names that the page answers to; numerical addresses need no name.

    Args:
      host: that the server listens on.
      allowed: further names, as the user gives them.

    Returns:
      Set of str in small letters.

    Raises:
      ValueError: if something in `allowed` is no name.
    """
    for name in allowed:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
            raise ValueError(f"--allow_host: expected a name such as lab7.example.org, without http:// and port, got {name!r}")
    names = {"localhost", *allowed}
    if host in EVERYWHERE:
        own = socket.gethostname()
        names |= {own, f"{own}.local", socket.getfqdn()}
    elif host != "localhost" and not is_address(host):
        names.add(host)
    return {name.lower() for name in names}


def is_trusted(host, names):
    """Whether the page may be called by what a request says it has called.

    A numerical address is always good: nobody can make one point elsewhere, as can be done with a name.

    Args:
      host: name or address, with or without a port; None where the request does not say.
      names: of `own_names`.

    Returns:
      bool.
    """
    match = _HOST.fullmatch(host or "")
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    return name in names or is_address(name)


def is_own_page(origin, host, allowed):
    """Whether a request comes from the page itself.

    Args:
      origin: what a browser says of the page that sends it, such as "http://localhost:8000"; None if no browser does.
      host: that the request is for.
      allowed: names that the user has given, of a proxy perhaps, which calls the server by another one.

    Returns:
      bool.
    """
    if origin is None:
        return True
    scheme, _, place = origin.lower().partition("://")
    if scheme not in _PORTS:
        return False
    own = host.lower().removesuffix(_PORTS[scheme])
    return place.removesuffix(_PORTS[scheme]) == own or urllib.parse.urlsplit(f"//{place}").hostname in allowed


def make_app(labeller, *, max_bytes, host="127.0.0.1", allowed=(), examples=()):
    """The web application. All that it answers but the page is JSON; errors are {"error": message}.

    Args:
      labeller: lcrf_jax network behind the page, see `photograph_page.Labeller`.
      max_bytes: largest upload.
      host: that the server listens on.
      allowed: names that the page answers to beside those of this machine.
      examples: what `photograph_page.examples_of` gives; everybody who sees the page can have them.

    Returns:
      flask.Flask.

    Raises:
      ValueError: if something in `allowed` is no name.
    """
    import flask

    names, allowed = own_names(host, allowed), {name.lower() for name in allowed}
    app = flask.Flask("lcrf_jax", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_bytes

    @app.before_request
    def _own_name():
        called = flask.request.headers.get("Host")
        if not is_trusted(called, names):
            shown = "without a name" if called is None else f"by the name {called[:80]!r}"
            return {
                "error": f"the page does not answer {shown}: open it as {', '.join(sorted(names))} or by a numerical address, "
                "or start it with --allow_host=NAME"
            }, 400  # fmt: skip

    @app.after_request
    def _headers(response):
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    def _page():
        return page(labeller, max_bytes, examples)

    @app.get("/examples/<int:number>")
    def _example(number):
        if number >= len(examples):
            flask.abort(404)
        return flask.Response(examples[number].content, mimetype="application/octet-stream")

    @app.post("/segment")
    def _segment():
        request = flask.request
        if request.headers.get(OWN_HEADER[0]) != OWN_HEADER[1]:  # no form of another page can send it
            raise Refused(f"photographs are taken from the page itself, or with the header {': '.join(OWN_HEADER)}", 403)
        if not is_own_page(request.headers.get("Origin"), request.headers["Host"], allowed):
            raise Refused(
                "photographs are not taken from other pages; if this is a proxy, start the page with --allow_host=NAME", 403
            )
        if request.mimetype.startswith("multipart/"):
            raise Refused("send the file itself as the body of the request, not a form: curl --data-binary @FILE", 415)
        with labeller.place():
            return labeller.answer(request.get_data(), **_settings(request.args))

    _register_errors(app, max_bytes)
    return app


def _settings(arguments):
    """Keyword arguments of `Labeller.answer` from those of an address."""
    given = {name: values[-1] for name, values in arguments.lists() if name != "tag"}
    crf = given.pop("crf", "1")
    if crf not in ("0", "1"):
        raise Refused(f"crf: expected 0 or 1, got {crf[:20]!r}")
    return {"given": given, "crf": crf == "1", "tags": arguments.getlist("tag") or None}


def _register_errors(app, max_bytes):
    """Every error as JSON that says what to do."""
    from werkzeug.exceptions import HTTPException

    messages = _MESSAGES | {413: f"the file is larger than {max_bytes / 1e6:g} MB: scale the photograph down, or use experiments.predict"}

    @app.errorhandler(Refused)
    def _refused(error):
        return {"error": str(error)}, error.code

    @app.errorhandler(HTTPException)
    def _http(error):
        return {"error": messages.get(error.code) or f"{error.code} {error.name}"}, error.code or 500

    @app.errorhandler(MemoryError)
    def _no_memory(_):
        return {"error": "there is too little memory for this photograph: scale it down"}, 507

    @app.errorhandler(Exception)
    def _failed(error):
        _log.error("a photograph could not be done", exc_info=error)
        told = f": {error}" if isinstance(error, ValueError) else ""
        return {"error": f"the program behind the page has failed{told}; the window that runs it says more"}, 500


def listening(host, port):
    """A socket that listens.

    Args:
      host: address or name of this machine.
      port: 0 for a free one.

    Returns:
      socket.socket.

    Raises:
      ValueError: if the machine has no such address, or the port is not free.
    """
    try:
        found = socket.getaddrinfo(host or EVERYWHERE[0], port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror as error:
        raise ValueError(f"--host: expected an address of this machine, got {host!r} ({error.strerror})") from error
    except OSError as error:
        raise ValueError(
            f"cannot listen on port {port} of {host} ({os.strerror(error.errno or 0)}): end the program that does, or give another --port "
            "(0 takes a free one) or --host"
        ) from error


def make_server(app, listener):
    """The server, ready to `serve_forever`.

    Args:
      app: of `make_app`.
      listener: of `listening`.

    Returns:
      The server of werkzeug; its `socket` is to be closed at the end.
    """
    from werkzeug.serving import WSGIRequestHandler
    from werkzeug.serving import make_server as make_werkzeug_server

    class Handler(WSGIRequestHandler):
        timeout = SECONDS_TO_SEND  # without a byte: who sends nothing keeps no place

    host, port = listener.getsockname()[:2]
    return make_werkzeug_server(host, port, app, threaded=True, request_handler=Handler, fd=listener.fileno())


def addresses(host, port):
    """Where a person may open the page.

    Args:
      host: that the server listens on.
      port: of it.

    Returns:
      List of str.
    """
    names = ["localhost", socket.gethostname()] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host]
    return [f"http://{name}:{port}" for name in names]
