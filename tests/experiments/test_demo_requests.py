"""Requests to the page for single photographs, with no network behind it: files, names, pages elsewhere, errors."""

import io
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from programs import run

from experiments import photograph_page, photograph_server

OWN = {"X-Requested-With": "lcrf_jax"}
HOME = "http://localhost:8000"
MOST_PIXELS = 100_000


class Plain(photograph_page.Labeller):
    """A labeller that labels everything background; the rest is that of the page."""

    def __init__(self):
        self.description = {"inference": {"kernel": dict.fromkeys((name for name, *_ in photograph_page.SLIDERS), 5)}}
        self.class_names, self._max_pixels = ("background", "a", "b"), MOST_PIXELS
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(2)
        self.seen = []

    def _labels(self, image, values, crf, present):
        assert self._lock.locked()
        self.seen.append(image)
        return np.zeros(image.shape[:2], np.uint8), np.ones(image.shape[:2], np.float16)


@pytest.fixture
def labeller():
    return Plain()


@pytest.fixture
def client(labeller):
    return photograph_server.make_app(labeller, max_bytes=200_000).test_client()


def sent(client, content, query="", **options):
    options = {"headers": OWN, "base_url": HOME} | options
    return client.post(f"/segment{query}", data=content, **options)


def file_of(image, kind="PNG", **options):
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def grey(height, width):
    return np.full((height, width, 3), 90, np.uint8)


def bomb(width, height):
    """A PNG of one byte of content whose head promises that many pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
REFUSED = {
    "text": ("", b"no photograph", 415, "save it as a JPEG, PNG, WebP, BMP, TIFF or GIF file"),
    "EPS, which would start Ghostscript": ("", EPS, 415, "save it as a JPEG, PNG"),
    "PPM": ("", file_of(grey(9, 9), "PPM"), 415, "save it as a JPEG, PNG"),
    "ICO": ("", file_of(grey(16, 16), "ICO"), 415, "save it as a JPEG, PNG"),
    "HTML": ("", b"<!doctype html><title>a.jpg</title>", 415, "save it as a JPEG, PNG"),
    "empty": ("", b"", 400, "the file is empty; choose another one"),
    "head alone": ("", file_of(grey(60, 60), "JPEG")[:200], 400, "damaged or cut short"),
    "cut short": ("", file_of(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8), "JPEG")[:1500], 400, "damaged or cut short: copy it again"),
    "cut PNG": ("", file_of(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))[:1500], 400, "damaged or cut short"),
    "changed bytes": ("", file_of(grey(60, 60)).replace(b"IDAT", b"JDAT"), 415, "or is damaged: save it as a JPEG"),
    "many pixels": ("", file_of(grey(400, 300)), 413, "300 x 400 pixels; at most 0.1 million are taken here: scale it down"),
    "a bomb": ("", bomb(9_000, 9_000), 413, "9000 x 9000 pixels; at most 0.1 million"),
    "a larger bomb": ("", bomb(20_000, 20_000), 413, "at most 0.1 million are taken here: scale it down"),
    "very wide": ("", file_of(grey(1, 70_000)), 413, "70000 x 1 pixels; a side may have 16,000 here: scale it down"),
    "a range that is not known": ("", file_of(Image.new("F", (9, 9), -1e6), "TIFF"), 400, "the photograph"),
    "large file": ("", b"x" * 200_001, 413, "larger than 0.2 MB: scale the photograph down"),
    "a slider of text": ("?bilateral_weight=x", file_of(grey(9, 9)), 400, "weight of position and colour: expected 0 to 20, got 'x'"),
    "a slider of nan": ("?bilateral_weight=nan", file_of(grey(9, 9)), 400, "expected 0 to 20"),
    "many iterations": ("?num_iterations=1000000", file_of(grey(9, 9)), 400, "iterations of mean field: expected 5 to 20"),
    "an unknown class": ("?tag=bird", file_of(grey(9, 9)), 400, "unknown class 'bird'"),
    "an unknown setting": ("?bilateral_wieght=1", file_of(grey(9, 9)), 400, "unknown setting 'bilateral_wieght'; there are crf, tag, bilateral_weight"),
    "another crf": ("?crf=yes", file_of(grey(9, 9)), 400, "crf: expected 0 or 1, got 'yes'"),
}  # fmt: skip


@pytest.mark.parametrize("query, content, code, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_is_refused(client, labeller, query, content, code, message):
    ended = sent(client, content, query)
    assert (ended.status_code, ended.mimetype) == (code, "application/json") and message in ended.get_json()["error"]
    assert not labeller.seen and sent(client, file_of(grey(9, 9))).status_code == 200


def test_nothing_is_decoded_before_its_size_is_known(client, monkeypatch):
    monkeypatch.setattr(photograph_page, "opened_as_rgb", lambda *_: pytest.fail("decoded"))
    assert sent(client, bomb(9_000, 9_000)).status_code == sent(client, file_of(grey(1, 70_000))).status_code == 413


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(grey(40, 30), "JPEG", exif=exif)


def animation(kind):
    frames = [Image.fromarray(np.full((30, 40, 3), value, np.uint8)) for value in (90, 200)]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


TAKEN = {
    "grey": file_of(grey(30, 40)[..., 0]), "transparent": file_of(Image.new("RGBA", (40, 30), (90, 90, 90, 255))),
    "CMYK": file_of(Image.fromarray(grey(30, 40)).convert("CMYK"), "JPEG"), "EXIF": turned(),
    "palette": file_of(Image.fromarray(grey(30, 40)).quantize()), "16 bits": file_of(np.full((30, 40), 90 * 257, np.uint16)),
    "animated GIF": animation("GIF"), "animated PNG": animation("PNG"), "animated WebP": animation("WEBP"),
    "WebP": file_of(grey(30, 40), "WEBP"), "BMP": file_of(grey(30, 40), "BMP"), "TIFF": file_of(grey(30, 40), "TIFF"),
    "MPO": animation("MPO"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_photographs_of_every_kind_are_taken(client, labeller, name):
    got = sent(client, TAKEN[name]).get_json()
    [image] = labeller.seen
    assert image.shape == (30, 40, 3) and got["overlay"].startswith("data:image/jpeg;base64,")
    assert abs(np.median(image).astype(int) - 90) < 4
    assert got["note"] == ("the first picture of several in the file" if name.startswith("animated") else "")


def test_the_message_names_all_that_is_taken(client):
    named = sent(client, b"x").get_json()["error"].upper()
    assert all(kind in named for kind in photograph_page.FORMATS)


def test_one_pixel(client, labeller):
    assert sent(client, file_of(grey(1, 1))).get_json()["classes"] == [
        {"name": "background", "colour": "#000000", "area": 1.0, "confidence": 1.0}
    ]


def test_a_camera_without_places_is_told_to_wait(client, labeller):
    with labeller.place(), labeller.place():
        ended = sent(client, file_of(grey(9, 9)))
        assert ended.status_code == 503 and "try again in a moment" in ended.get_json()["error"]
    for _ in range(3):
        sent(client, b"")
    assert sent(client, file_of(grey(9, 9))).status_code == 200


@pytest.mark.parametrize("error, code, message", [
    (RuntimeError("secret"), 500, "has failed; the window that runs it says more"),
    (MemoryError(), 507, "too little memory for this photograph: scale it down"),
])
def test_what_fails_inside_is_json_too(client, labeller, monkeypatch, caplog, error, code, message):
    def failing(*_):
        raise error

    monkeypatch.setattr(labeller, "_labels", failing)
    ended = sent(client, file_of(grey(9, 9)))
    assert ended.status_code == code and message in ended.get_json()["error"] and "secret" not in ended.get_json()["error"]
    assert code != 500 or "RuntimeError: secret" in caplog.text
    monkeypatch.undo()
    assert sent(client, file_of(grey(9, 9))).status_code == 200


@pytest.mark.parametrize("method, path, code, message", [
    ("GET", "/nothing", 404, "the page is at /"),
    ("POST", "/nothing", 404, "photographs go to /segment"),
    ("GET", "/segment", 405, "by POST to /segment"),
    ("POST", "/", 405, "by GET from /"),
    ("PUT", "/segment", 405, "by POST"),
])
def test_other_addresses_and_methods(client, method, path, code, message):
    ended = client.open(path, method=method, base_url=HOME)
    assert ended.status_code == code and message in ended.get_json()["error"]


def test_a_form_is_no_photograph(client):
    ended = sent(client, {"file": (io.BytesIO(file_of(grey(9, 9))), "a.png")}, content_type="multipart/form-data")
    assert ended.status_code == 415 and "curl --data-binary @FILE" in ended.get_json()["error"]
    assert sent(client, file_of(grey(9, 9)), content_type="application/x-www-form-urlencoded").status_code == 200


def test_pages_elsewhere_cannot_send(client):
    image = file_of(grey(9, 9))
    ended = sent(client, image, headers={})
    assert ended.status_code == 403 and "X-Requested-With: lcrf_jax" in ended.get_json()["error"]
    for origin in ("http://example.com", "null", "http://localhost:3000", "https://localhost", "file://", "http://localhost:8000.example.com",
                   "http://example.com/http://localhost:8000"):
        ended = sent(client, image, headers=OWN | {"Origin": origin})
        assert ended.status_code == 403 and "not taken from other pages" in ended.get_json()["error"], origin
    assert sent(client, image, headers=OWN | {"Origin": HOME}).status_code == 200
    shown = client.get("/", base_url=HOME)
    assert "default-src 'none'" in shown.headers["Content-Security-Policy"] and shown.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in client.options("/segment", base_url=HOME).headers


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_names_of_others_are_refused_on_any_address(labeller, host):
    client = photograph_server.make_app(labeller, max_bytes=99, host=host, allowed=["Lab7.example.org"]).test_client()
    for name in ("example.com", "localhost.example.com", "127.0.0.1.example.com", "lab7.example.org.evil.com", "a@localhost",
                 "localhost/a", "127.0.0.1:8000:9", "evil-localhost", "", "lab8.example.org"):
        for path in ("/", "/segment", "/nothing"):
            ended = client.get(path, headers={"Host": name})
            assert ended.status_code == 400 and "--allow_host=NAME" in ended.get_json()["error"], name
    for name in ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:8000", "[::1]:8000", "[::1]", "192.168.3.7:8000", "lab7.example.org",
                 *([socket.gethostname()] if host == "0.0.0.0" else [])):
        assert client.get("/", headers={"Host": name}).status_code == 200, name


def test_a_proxy_with_a_name_that_was_allowed_may_send(labeller):
    client = photograph_server.make_app(labeller, max_bytes=999, allowed=["hub.example.org"]).test_client()
    for host in ("hub.example.org", "127.0.0.1:8000"):
        headers = OWN | {"Host": host, "Origin": "https://hub.example.org"}
        assert sent(client, file_of(grey(9, 9)), headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["http://lab7", "lab7:8000", "*", "", ".example.org", "a b"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="--allow_host: expected a name such as lab7.example.org, without http:// and port, got "):
        photograph_server.own_names("127.0.0.1", [name])


def test_a_port_that_is_taken_and_an_address_of_others():
    with photograph_server.listening("localhost", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port} of .*: end the program that does, or give another --port"):
            photograph_server.listening(taken.getsockname()[0], port)
    with pytest.raises(ValueError, match="cannot listen on port 0 of 192.0.2.1"):
        photograph_server.listening("192.0.2.1", 0)
    with pytest.raises(ValueError, match="--host: expected an address of this machine, got 'no such host'"):
        photograph_server.listening("no such host", 0)


def test_a_server_tells_of_a_large_file_and_goes_on(labeller):
    """Over a true connection, where an answer before the end of the upload could be lost."""
    with photograph_server.listening("127.0.0.1", 0) as listener:
        server = photograph_server.make_server(photograph_server.make_app(labeller, max_bytes=1_000), listener)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        head = "POST /segment HTTP/1.1\r\nHost: localhost\r\nX-Requested-With: lcrf_jax\r\nContent-Length: {}\r\n\r\n"
        small = file_of(grey(9, 9))
        try:
            for content, code, message in ((b"x" * 3_000_000, b"413", b"larger than 0.001 MB"), (small, b"200", b'"classes"')):
                with socket.create_connection(listener.getsockname()) as connection:
                    connection.sendall(head.format(len(content)).encode() + content)
                    connection.shutdown(socket.SHUT_WR)
                    got = b"".join(iter(lambda: connection.recv(1 << 20), b""))
                assert got.split()[1] == code and message in got
        finally:
            server.shutdown()
            server.server_close()


def test_the_program_refuses_before_it_loads_anything(tmp_path):
    ended = run("demo", f"--checkpoint={tmp_path}", "--allow_host=http://a")
    assert ended.code == 1 and ended.err.strip() == (
        "error: --allow_host: expected a name such as lab7.example.org, without http:// and port, got 'http://a'"
    )
