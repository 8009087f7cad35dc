"""Prediction by Ray Data, on one machine or a cluster: photographs are decoded in tasks, the network and the CRF run in actors.

Nothing else imports Ray. A batch is one block of Ray's: an actor that dies is started again and does its batch once more, and
no other. It writes the rows of a batch before its masks, in a file of their own, so that a mask that is there has its row.
"""

import contextlib
import hashlib
import importlib.util
import logging
import math
import os
import pathlib
import tempfile
import warnings
from typing import NamedTuple

from lcrf_jax.data.files.images import image_size
from lcrf_jax.machine import signals
from lcrf_jax.machine.errors import UserError, for_users
from lcrf_jax.machine.files import move_whole, naming
from lcrf_jax.machine.locks import locked, own_folder

from .prediction_photographs import moment, read_photograph
from .prediction_urls import is_url, place, send

TABLE = "predictions.parquet"
PARTS = "predictions-parts"
LARGE_PIXELS = 20_000_000  # a larger photograph is not sent through Ray: the actor reads it
MOST_TRIES = 4  # of a batch whose worker dies each time


class Job(NamedTuple):
    """What an actor needs to know.

    Attributes:
      out: folder or URL of the masks.
      class_names: names of the K classes.
      crf, tile: see `predictions.begin_labelling`.
      overlays, probabilities: whether these are wanted.
      facts: more for each row.
      batch_size: photographs in a batch.
      threads: cores of an actor; None for all.
    """

    out: str
    class_names: tuple[str, ...]
    crf: bool
    tile: int | None
    overlays: bool
    probabilities: bool
    facts: dict
    batch_size: int
    threads: int | None = None


def rows_of(todo, out, tags):
    """The photographs that are to be done, as rows of Ray.

    Args:
      todo: pairs of photograph and Outputs.
      out: place of the masks.
      tags: dict from photograph to [K] bool, or None.

    Returns:
      List of dict. Names are bytes: Ray takes no text of a file name that is no UTF-8.
    """
    return [{
        "photo": os.fsencode(str(photo)), "mask": os.fsencode(str(outputs.mask.relative_to(out))),
        "at": os.fsencode(str(photo) if is_url(photo) else os.path.abspath(photo)),  # workers are in folders of their own
        "tags": b"" if tags is None else tags[photo].tobytes(),
    } for photo, outputs in todo]  # fmt: skip


def decoded(row):
    """A row with the pixels of its photograph, or with what is wrong with it. Large ones stay where they are."""
    place_of = os.fsdecode(row["at"])
    nothing = {"pixels": b"", "height": 0, "width": 0, "problem": "", "read": moment(place_of)}
    with contextlib.suppress(ValueError, OSError):
        if not is_url(place_of) and math.prod(image_size(place_of)) > LARGE_PIXELS:
            return {**row, **nothing}
    image = _read(row)
    if isinstance(image, str):
        return {**row, **nothing, "problem": as_text(image)}
    if image.size > 3 * LARGE_PIXELS:
        return {**row, **nothing}
    return {**row, **nothing, "pixels": image.tobytes(), "height": image.shape[0], "width": image.shape[1]}


def _read(row):
    """The photograph of a row, or why it cannot be read, in the words of who named it."""
    place_of = os.fsdecode(row["at"])
    image = read_photograph(place_of)
    return image.replace(place_of, os.fsdecode(row["photo"])) if isinstance(image, str) else image


def as_text(name):
    """A text with marks in place of bytes that are no UTF-8."""
    return name.encode(errors="replace").decode()


class Labeller:
    """An actor: batches of decoded rows in, masks and rows of the table written, what went wrong out.

    Args:
      opened: function without arguments that gives (description, parameters) of the run.
      job: Job.
    """

    def __init__(self, opened, job):
        if job.threads is not None:
            os.environ["NPROC"] = str(job.threads)  # XLA's threads on a CPU
        from lcrf_jax.machine.cache import default_directory
        from lcrf_jax.machine.compilation import keep_programs
        from lcrf_jax.predict.segmenter import make_segmenter

        with contextlib.suppress(OSError):
            keep_programs(default_directory())
        self._job, self._out = job, place(job.out)
        self._segmenter = make_segmenter(*opened())

    def __call__(self, batch):
        """Label a batch.

        Args:
          batch: pyarrow.Table of rows from `decoded`.

        Returns:
          dict of columns: photo; problem, which is empty where a mask is there; ends, whether it is the end of the run: Ray
          keeps of an error nothing but its traceback.
        """
        rows = [row | {name: os.fsdecode(row[name]) for name in ("photo", "at", "mask")} for row in batch.to_pylist()]
        try:
            with _tried(self._out / PARTS / f"{_name_of(rows)}.tries") as count:
                problems = self._labelled(rows) if count <= MOST_TRIES else dict.fromkeys(
                    (row["photo"] for row in rows), f"a worker has died {MOST_TRIES} times at it, or at one of its batch: give workers "
                    "more memory, or predict the photographs of this list one by one to find it")  # fmt: skip
        except Exception as error:
            if not for_users(error):
                raise
            return _told({rows[0]["photo"]: str(error)}, ends=True)
        return _told(problems, ends=False)

    def _labelled(self, rows):
        import numpy as np

        from lcrf_jax.predict.segmenter import image_workers

        from . import predictions
        from .prediction_plan import outputs_for

        job, since, problems = self._job, predictions.settings_since(self._out), {row["photo"]: row["problem"] for row in rows}
        images = {}
        for row in rows:
            image = _image_of(row)
            if isinstance(image, str):
                problems[row["photo"]] = image
            else:
                images[row["photo"]] = image
        good = [row for row in rows if row["photo"] in images]
        if not good:
            return problems
        tags = [np.frombuffer(row["tags"], bool) for row in good] if good[0]["tags"] else None
        with image_workers(job.threads) as workers:
            found = list(predictions.begin_labelling(
                self._segmenter, list(images.values()), tags, workers, crf=job.crf, tile=job.tile, batch_size=job.batch_size
            ))  # fmt: skip
        records = [predictions.record_of(row["photo"], row["mask"], labels, confidence, job.class_names, **job.facts)
                   for row, (labels, confidence, _) in zip(good, found, strict=True)]  # fmt: skip
        with _written_to(self._out) as (folder, unfinished):
            write_part(self._out, unfinished, records)
            for row, (labels, _, log_probs) in zip(good, found, strict=True):
                outputs = outputs_for(folder, pathlib.Path(row["mask"]), overlays=job.overlays, probabilities=job.probabilities)
                problem = predictions.write_outputs(
                    outputs, unfinished, images[row["photo"]], labels, log_probs, np.array(job.class_names), read=max(row["read"], since)
                )
                problems[row["photo"]] = problem or ""
                if folder is not self._out and not problem:
                    for path in (*filter(None, outputs[1:]), outputs.mask):
                        send(path, self._out / path.relative_to(folder).as_posix())
        return problems


def _told(problems, ends):
    return {"photo": list(map(os.fsencode, problems)), "problem": list(map(as_text, problems.values())), "ends": [ends] * len(problems)}


def _image_of(row):
    """The photograph of a row, or what is wrong with it."""
    import numpy as np

    if row["problem"]:
        return row["problem"]
    if not row["height"]:
        return _read(row)
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)


@contextlib.contextmanager
def _written_to(out):
    """(folder that outputs are written to, folder for what is unfinished): those of a URL are written here and sent."""
    if is_url(out):
        with tempfile.TemporaryDirectory(prefix="lcrf_jax-") as folder:
            (pathlib.Path(folder) / "unfinished").mkdir()
            yield pathlib.Path(folder) / "out", pathlib.Path(folder) / "unfinished"
    else:
        with own_folder(out, ".unfinished-") as unfinished:
            yield out, unfinished


def write_part(out, unfinished, records):
    """Write the rows of a batch as a Parquet file, named for its masks: the same batch once more replaces it.

    Args:
      out: place of the masks.
      unfinished: folder on this machine.
      records: list of dict, see `predictions.record_of`.
    """
    _write_table(_as_table(records), unfinished, out / PARTS / f"{_name_of(records)}.parquet")


def _name_of(rows):
    """A name for a batch, the same for the same masks."""
    masks = "\n".join(row["mask"] for row in rows)
    return hashlib.sha256(masks.encode(errors="surrogatepass")).hexdigest()[:24]


@contextlib.contextmanager
def _tried(path):
    """How often the work of the block was begun, this time among them; a file keeps count while it is not done."""
    before = 0
    with contextlib.suppress(OSError, ValueError):
        before = int(path.read_text(encoding="utf-8"))
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(before + 1), encoding="utf-8")
    yield before + 1
    with contextlib.suppress(OSError):
        path.unlink()


def gathered(out, again):
    """One table of all parts, without the rows of masks that are about to be made again; the parts are removed.

    Args:
      out: place of the masks.
      again: paths of masks within it.
    """
    import pyarrow
    import pyarrow.parquet

    files = list((out / PARTS).glob("*.*")) if (out / PARTS).exists() else []
    parts = [path for path in files if path.suffix == ".parquet"]
    tables = []
    for path in [out / TABLE, *parts]:
        if path.exists():
            with path.open("rb") as file:
                tables.append(pyarrow.parquet.read_table(file))
    if tables:
        _write_gathered(out, pyarrow.concat_tables(tables), again)
    for path in files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (out / PARTS).rmdir()


def _write_gathered(out, table, again):
    import pyarrow
    import pyarrow.compute

    table = table.filter(pyarrow.compute.invert(pyarrow.compute.is_in(table["mask"], pyarrow.array(again, pyarrow.string()))))
    # Of a mask with two rows the later counts; there are two where a run ended amid `gathered`.
    last = {mask: at for at, mask in enumerate(table["mask"].to_pylist())}
    table = table.take(pyarrow.array(sorted(last.values()), pyarrow.int64())).sort_by("mask")
    with tempfile.TemporaryDirectory(prefix="lcrf_jax-") if is_url(out) else own_folder(out, ".unfinished-") as folder:
        _write_table(table, pathlib.Path(folder), out / TABLE)


def _as_table(records):
    import pyarrow

    text, real = pyarrow.string(), pyarrow.float64()
    classes = pyarrow.list_(pyarrow.struct([("name", text), ("area", real), ("confidence", real)]))
    schema = pyarrow.schema([("image", text), ("mask", text), ("width", pyarrow.int32()), ("height", pyarrow.int32()), ("classes", classes),
                             ("confidence", real), ("refined", pyarrow.bool_()), ("tags_used", pyarrow.bool_())])  # fmt: skip
    rows = [record | {"classes": [{"name": name, **entry} for name, entry in record["classes"].items()]} for record in records]
    # A file name that is no UTF-8 is told with marks in place of its odd bytes.
    plain = [{key: as_text(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    return pyarrow.Table.from_pylist(plain, schema=schema)


def _write_table(table, unfinished, target):
    import pyarrow.parquet

    half = unfinished / "half.parquet"
    with naming(target):
        pyarrow.parquet.write_table(table, half)
        if is_url(target):
            send(half, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            move_whole(half, target)


def label_by_ray(rows, run, job, *, again, workers, cores, quiet):
    """Label photographs by Ray Data, on the cluster of RAY_ADDRESS or on this machine.

    Args:
      rows: see `rows_of`.
      run: (description, parameters).
      job: Job.
      again: masks whose rows go before there are new ones.
      workers: number of actors; None for one a GPU or, without GPUs, as many as there are cores for.
      cores: of each actor, where there is no GPU.
      quiet: whether to show no progress.

    Returns:
      dict from photograph to what was wrong with it.

    Raises:
      UserError: if an actor has met what the user can mend.
    """
    out = place(job.out)
    lock = out / ".ray.lock"
    with contextlib.nullcontext() if is_url(out) else locked(lock):
        ray = started(quiet=quiet)
        gathered(out, list(map(as_text, again)))
        try:
            return _labelled_by(ray, rows, run, job, workers, cores)
        except ray.exceptions.ActorDiedError as error:
            raise UserError("the workers die as they start (is there too little memory?): what is done is kept; start fewer "
                            "--workers, and run the same command again") from error  # fmt: skip
        finally:
            ray.shutdown()
            gathered(out, [])
            if not is_url(out):
                lock.unlink(missing_ok=True)


def check_installed():
    """Refuse to begin where Ray is not installed."""
    try:
        found = importlib.util.find_spec("ray")
    except ValueError:  # half an installation
        found = None
    if found is None:
        raise UserError("--engine=ray needs Ray, which is not installed: pip install '.[ray]' in your clone")


def started(*, quiet):
    """Ray, connected to a cluster or with one of its own on this machine: no dashboard, and no word to its makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    if not ray.is_initialized():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX warns of it; Ray starts programs
        try:
            ray.init(include_dashboard=False, log_to_driver=not quiet, logging_level=logging.WARNING if quiet else logging.INFO)
        except Exception as error:  # Ray raises errors of every kind
            raise UserError(f"Ray does not start, or its cluster cannot be reached ({str(error).splitlines()[0]}): look at RAY_ADDRESS and "
                            "/tmp/ray/session_latest/logs, and run the same command again") from error  # fmt: skip
        signals.raise_on_termination()  # Ray has its own handler
    if quiet:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = not quiet
    return ray


def _labelled_by(ray, rows, run, job, workers, cores):
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actor = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": cores}
    count = workers or gpus or max(int(resources.get("CPU", 1)) // cores, 1)
    stored = ray.put(run)
    done = (
        ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / job.batch_size))
        # Without GPUs the actors take all cores. Decoding is a small part of the work, and must not wait for one.
        .map(decoded, num_cpus=1 if gpus else 0, compute=None if gpus else ray.data.TaskPoolStrategy(size=count))
        .map_batches(
            Labeller, fn_constructor_args=(_Opened(stored), job._replace(threads=None if gpus else cores)), batch_size=None,  # a block is a batch
            batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=count), **actor,
        )
    )  # fmt: skip
    problems = {}
    for row in done.iter_rows():
        if row["ends"]:
            raise UserError(row["problem"])
        if row["problem"]:
            problems[os.fsdecode(row["photo"])] = row["problem"]
    return problems


class _Opened:
    """The run, taken from Ray's store by the actor that asks for it."""

    def __init__(self, stored):
        self._stored = stored

    def __call__(self):
        import ray

        return ray.get(self._stored)
