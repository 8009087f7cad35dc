"""The segments of a run: what it was trained with from which step on, in config.json.

A run that is taken up again may go on with other settings, versions or devices. Each start that trains adds a segment::

    {"first_step": 1, "date": ..., "machine": ..., "versions": {...}, "changed": {}}
    {"first_step": 501, ..., "changed": {"optimizer.learning_rate": {"was": 0.001, "is": 0.01}}}

"training" and "versions" of config.json are those of the last segment. What a start did that was killed before it saved
anything is in no parameters: the next one drops its segment.
"""

import datetime
import json
import platform
import socket
from collections.abc import Mapping
from typing import Any

import jax


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, as they are written on the command line.

    Args:
      settings: nested dicts.
      prefix: of the names, ending with a dot.

    Returns:
      dict.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In which settings two runs differ.

    Args:
      before, now: settings by their dotted names, as JSON has them.

    Returns:
      dict from the name of each to a text, "config.seed was 0, is 1".
    """
    return {name: f"config.{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)}  # fmt: skip


def settings_until(description: Mapping[str, Any], done: int) -> dict[str, Any]:
    """The settings that the newest state of a run was trained with.

    Args:
      description: content of config.json.
      done: steps of that state; segments that begin after it left nothing.

    Returns:
      dict from dotted names to values.
    """
    settings = flat_settings(description.get("training", {}))
    for segment in reversed(_dropped(description, done)):
        for name, values in segment["changed"].items():
            if "was" in values:
                settings[name] = values["was"]
            else:
                settings.pop(name, None)
    return settings


def versions_until(description: Mapping[str, Any], done: int) -> dict[str, str]:
    """The versions of the libraries that the newest state of a run was trained with.

    Args:
      description: content of config.json.
      done: steps of that state.

    Returns:
      dict from distributions to versions.
    """
    kept = _kept(description, done)
    return dict(kept[-1]["versions"] if kept else description.get("versions", {}))


def with_segment(before: Mapping[str, Any] | None, now: Mapping[str, Any], done: int) -> dict[str, Any]:
    """A description with the segments of the run so far and the one that begins now.

    Args:
      before: content of config.json, or None for a run that begins.
      now: description of what is trained now, with "training" and "versions".
      done: steps done before.

    Returns:
      dict: `now` with "segments".
    """
    kept: list[dict[str, Any]] = []
    changed: dict[str, Any] = {}
    if before is not None and done:
        old, new = settings_until(before, done), flat_settings(json.loads(json.dumps(now["training"])))
        for name in changed_settings(old, new):
            sides = {"was": old, "is": new}
            changed[name] = {side: values[name] for side, values in sides.items() if name in values}
        # A run of a version that wrote no segments has begun with what it says.
        kept = _kept(before, done) or [{"first_step": 1, "versions": before.get("versions", {}), "changed": {}}]
    segment = {
        "first_step": done + 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": this_machine(),
        "versions": now["versions"],
        "changed": changed,
    }
    return {**now, "segments": [*kept, segment]}


def this_machine() -> str:
    """Host, devices and processes in a line."""
    devices = jax.devices()
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{socket.gethostname()}: {len(devices)} x {devices[0].device_kind}{processes}, {platform.machine()}, Python {platform.python_version()}"


def _kept(description, done):
    return [segment for segment in description.get("segments", ()) if segment["first_step"] <= done]


def _dropped(description, done):
    return [segment for segment in description.get("segments", ()) if segment["first_step"] > done > 0]
