"""A run: its directory and state, and what a job does beside training: processes, signals, locks, how it ended."""

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run, list_runs
from fiddlehead.run.status import State, Status

__all__ = ["RunDirectory", "State", "Status", "find_run", "list_runs"]
