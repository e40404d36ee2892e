"""metrics.csv: the lines of metrics.jsonl as a table, one row per log step and one column per name."""

import csv
from collections.abc import Mapping
from pathlib import Path

from newllm.callbacks.logger import Logger
from newllm.whole_file import whole_file

Row = dict[str, str]


class CsvTable(Logger):
    """Writes a run's numbers for spreadsheets; an empty cell was not measured at that step.

    Rows are appended. The file is written anew where a name comes up for the first time or a step gets more numbers.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = ["step"]
        self._last_step: int | None = None

    def open(self, *, first_step: int = 0) -> None:
        if self.path.exists():
            self._write([row for row in self._read() if int(row["step"]) < first_step])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": str(step), **{name: repr(value) for name, value in values.items()}}
        if self._last_step == step:
            *others, last = self._read()
            self._write([*others, {**last, **row}])
        elif not self.path.exists() or not row.keys() <= set(self._columns):
            self._write([*self._read(), row])
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self._last_step = step

    def flush(self) -> None:
        """Do nothing: every row is on its way to the disk when it is added."""

    def close(self) -> None:
        """Do nothing: the file is open only while a row is added."""

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            # A last row that a killed process tore lacks cells, or the end of one: what is made again replaces it.
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        return [{name: cell for name, cell in row.items() if cell} for row in rows]

    def _write(self, rows: list[Row]) -> None:
        self._columns = list(dict.fromkeys(["step", "tokens", *(name for row in rows for name in row)]))
        self._last_step = int(rows[-1]["step"]) if rows else None
        with whole_file(self.path) as file:
            lines = [",".join(self._columns), *(",".join(row.get(name, "") for name in self._columns) for row in rows)]
            file.write("".join(f"{line}\n" for line in lines).encode())
