"""A phase's results on disk: one JSON file of a header and rows, written after every row."""

import json

from mnet_kernels.training.checkpoint import write_atomic
from mnet_kernels.training.metrics import dumps


class Results:
    """Rows under one header.  A row has a ``key`` (dict); a row with ``error`` does not count as measured.

    An existing file of the same identity (sources, card, versions) is gone on with; one of another identity is put
    aside as ``NAME-1.json``, ``NAME-2.json``, ...; one that cannot be read, too.
    """

    def __init__(self, path, header, identity):
        self.path, self.header, self.rows, self.aside = path, header | {"identity": identity}, [], None
        path.parent.mkdir(parents=True, exist_ok=True)
        old = self._read()
        if old is not None and old["header"].get("identity") == json.loads(dumps(identity)):
            self.rows = old["rows"]
            self.header = old["header"] | {"continued": old["header"].get("continued", 0) + 1}
        elif path.exists():
            number = 1
            while (aside := path.with_stem(f"{path.stem}-{number}")).exists():
                number += 1
            path.rename(aside)
            self.aside = aside.name
        self.write()

    def _read(self):
        try:
            found = json.loads(self.path.read_text())
            return found if isinstance(found["header"], dict) and isinstance(found["rows"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def find(self, key):
        """The measured row of a key, or None."""
        key = json.loads(dumps(key))
        return next((row for row in self.rows if row["key"] == key and "error" not in row), None)

    def add(self, key, **values):
        """Add a row in the place of a failed one of the same key; a measured one is kept as it is."""
        if self.find(key) is None:
            row = json.loads(dumps({"key": key, **values}))
            self.rows = [old for old in self.rows if old["key"] != row["key"]] + [row]
            self.write()

    def write(self):
        write_atomic(self.path, (dumps({"header": self.header, "rows": self.rows}, indent=1) + "\n").encode())
