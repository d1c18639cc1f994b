"""fiddlehead trains transformer language models from Python recipes and launches them anywhere.

Importing this package imports nothing heavy; import what you need from its modules:

- `fiddlehead.recipe`: `Recipe`, the complete configuration of a run
- `fiddlehead.recipes`: the named runs
- `fiddlehead.launch`: planning and starting runs
- `fiddlehead.tasks`: the tasks that a recipe configures
"""

import sys

if sys.platform == "win32":
    sys.exit("error: fiddlehead runs on Linux and macOS; on Windows, use the Windows Subsystem for Linux")

__version__ = "0.1.0"
