"""Looks at runs: records, comparisons, curves, reports. Nothing here writes to a run.

In Python, `frame("runs/*")` has the metrics of runs as a pandas DataFrame, and `summary("runs/*")` a row for each run.
Importing this package imports nothing heavy.
"""

from fiddlehead.runs.frames import frame, summary
from fiddlehead.runs.record import Record, open_record

__all__ = ["Record", "frame", "open_record", "summary"]
