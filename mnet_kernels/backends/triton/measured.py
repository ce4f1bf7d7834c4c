"""The file of configurations measured on one card: where it is, what it must say to be used, and what it holds.

``python -m mnet_kernels.tune`` writes it, ``configs.py`` reads it once a process.  It lies in ``MNET_TUNE_DIR``, else
in ``mnet_kernels/tune`` below ``XDG_CACHE_HOME`` or ``~/.cache``, one file for a card's name and a version of triton,
and serves only while card, capability, triton and the kernels' source are those it was measured with.  ``MNET_TUNE=0``
leaves it out.

A row: ``kernel``, ``shape``, ``bytes`` of the storage dtype, ``config``, ``microseconds`` of it and
``table_microseconds`` of the table's row beside it (both summed over the layers timed), ``card``, ``capability``,
``package`` (version), ``commit`` (null where there is no git), ``date``.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
from pathlib import Path

FORMAT = 1


def wanted():
    """Whether measured rows are used at all."""
    return os.environ.get("MNET_TUNE", "1") != "0"


@functools.cache
def triton_version():
    """The installed triton's version; None without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def kernels():
    """A hash of the kernels' source and of the table: another one may make other rows the best."""
    found = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name not in ("__init__.py", Path(__file__).name):
            found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def directory():
    """Where the files are."""
    own = os.environ.get("MNET_TUNE_DIR")
    if own:
        return Path(own)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache") / "mnet_kernels" / "tune"


def path(card):
    """The file of a card, whether it is there or not."""
    return directory() / (re.sub(r"[^A-Za-z0-9.]+", "_", card) + f"-{triton_version()}.json")


def identity(card, capability):
    """What a file must say to serve a card."""
    return {
        "format": FORMAT,
        "card": card,
        "capability": list(capability),
        "triton": triton_version(),
        "kernels": kernels(),
    }


def read(file, card, capability):
    """The rows of a file, as plain values; [] where there is none.

    Raises:
        ValueError: the file cannot be used, and why.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError("it is not an object with rows")
    for name, value in identity(card, capability).items():
        if document.get(name) != value:
            raise ValueError(f"its {name} is {document.get(name)!r}, here it is {value!r}")
    for row in document["rows"]:
        why = _flaw(row, document)
        if why:
            raise ValueError(f"row {row!r}: {why}")
    return document["rows"]


def _flaw(row, document):
    """What a row lacks besides a possible configuration (configs.py); None if nothing."""
    if not isinstance(row, dict):
        return "it is not an object"
    for name in ("card", "capability"):
        if row.get(name) != document[name]:
            return f"its {name} is not the file's"
    for name in ("microseconds", "table_microseconds"):
        value = row.get(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            return f"{name} is not a positive number"
    for name in ("date", "package"):
        if not isinstance(row.get(name), str) or not row[name]:
            return f"it has no {name}"
    return None
