"""Rewrites a NeMo 2.0 script as a recipe file and a launch file. The script is read as text; nothing of it is run.

`simplify` first puts the script in a simpler form, with `options` of its command line as parameters. `script` walks
through the lines. `models` begins a recipe, `parts` finds what the script makes in variables and functions of its own,
`fields` writes what is set in a recipe under the names of this package, `plugins` what NeMo's plugins mean, `executors`
keeps NeMo-Run's executors as they are, `starts` makes commands of what starts a job, and `writer` writes the files.
"""

from fiddlehead.migrate.report import Migrated
from fiddlehead.migrate.script import migrate
from fiddlehead.migrate.writer import write

__all__ = ["Migrated", "migrate", "write"]
