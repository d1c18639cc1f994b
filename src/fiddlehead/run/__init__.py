"""A run: its directory and state, and what a job does beside training: processes, signals, locks, how it ended."""

from fiddlehead.run.directory import RunDirectory, State, Status, find_run, list_runs

__all__ = ["RunDirectory", "State", "Status", "find_run", "list_runs"]
