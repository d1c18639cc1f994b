"""The code that a job runs: a copy of the working tree as it was when the run was launched."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fiddlehead import project
from fiddlehead.errors import ConfigError
from fiddlehead.launch import secrets
from fiddlehead.runs import RunDirectory, write_atomically

MAX_BYTES = 200_000_000
"""The most that is shipped: more is data or checkpoints, and would slow every launch."""


@dataclass(frozen=True)
class CodeCopy:
    """What was shipped with a run; `RUN/code.json` has it."""

    root: Path
    """The working tree."""
    path: Path
    """Its copy."""
    directory: Path
    """The folder in the working tree that the run was launched from."""
    files: int
    bytes: int
    revision: str = ""
    """The git commit that the tree is at; "" outside a repository, or before its first commit."""
    modified: int = 0
    """Files that differ from the commit, deleted ones among them."""
    untracked: int = 0
    """Files that git neither tracks nor ignores."""

    def counterpart(self, path: Path) -> Path:
        """Where the copy has what the working tree has at `path`."""
        return self.path / Path(os.path.realpath(path)).relative_to(self.root)

    def python_path(self) -> list[str]:
        """The folders of the copy to import from, in place of those of the working tree that this process imports from.

        An editable installation is one of them, however it was made; an environment with its packages is not, nor is
        the working directory, where a job looks last, unless PYTHONPATH says otherwise.
        """
        folders = [*map(Path, filter(None, sys.path)), *_folders_of_loaded_modules()]
        found = dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders)
        if not project.comes_first(self.directory):
            found.pop(self.directory, None)
        inside = [folder for folder in found if _within(folder, self.root) and "site-packages" not in folder.parts]
        return [str(copied) for folder in inside if (copied := self.counterpart(folder)).is_dir()]

    def describe(self) -> str:
        """One line for the user."""
        text = f"shipped {_count(self.files, 'file')}, {_size(self.bytes)}"
        if not self.revision:
            return f"{text}, at no git revision"
        changes = [_count(self.modified, "modified file")] if self.modified else []
        changes += [_count(self.untracked, "new file")] if self.untracked else []
        return f"{text}, revision {self.revision[:7]}" + (f" with {' and '.join(changes)}" if changes else "")


def ship(directory: Path, destination: Path, *, exclude: Sequence[Path] = ()) -> CodeCopy:
    """Copies the working tree that holds `directory`, as it is now, in place of an earlier copy.

    In a git repository that is what git tracks, with uncommitted changes, and what it does not ignore, likewise in
    submodules. Elsewhere it is `directory` without hidden folders, caches and virtual environments. Links stay links.

    Args:
        exclude: folders to leave out, such as that of the runs.

    Raises:
        ConfigError: it is larger than `MAX_BYTES`, or git or a file cannot be read.
    """
    directory = Path(os.path.realpath(directory))
    git_root = _git_root(directory)
    root = git_root or directory
    excluded = [Path(os.path.realpath(path)) for path in (*exclude, destination.parent, secrets.folder())]
    excluded = [path for path in excluded if path not in (directory, *directory.parents)]
    names = _git_files(root) if git_root else _plain_files(root, excluded)
    sizes = _sizes(root, names, excluded)
    total = sum(sizes.values())
    if total > MAX_BYTES:
        raise ConfigError(_too_large(root, sizes, total))
    _replace(root, destination, [*sizes], directory.relative_to(root))
    state = _git_state(root, excluded) if git_root else ("", 0, 0)
    copy = CodeCopy(root, destination, directory, len(sizes), total, *state)
    write_atomically(destination.with_name("code.json"), json.dumps(vars(copy), default=str, indent=1) + "\n")
    return copy


def shipped(run: RunDirectory) -> CodeCopy | None:
    """What was shipped with a run; None if its job imports the working tree itself."""
    try:
        recorded = json.loads(run.code.with_name("code.json").read_text())
    except FileNotFoundError:
        return None
    return CodeCopy(**{**recorded, **{name: Path(recorded[name]) for name in ("root", "path", "directory")}})


def _git_root(directory: Path) -> Path | None:
    """The top of the git working tree that `directory` is in; None if there is none."""
    if not any((folder / ".git").exists() for folder in (directory, *directory.parents)):
        return None
    root = Path(os.fsdecode(_git(directory, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
    if subprocess.run(["git", "-C", str(directory), "check-ignore", "-q", str(directory)]).returncode == 0:
        raise ConfigError(f"the code to ship: git ignores {directory}; launch from elsewhere, or `git init` there")
    return root


def _git_files(root: Path) -> Iterator[str]:
    """What git tracks or does not ignore, as paths from `root`; those of the repositories within it likewise."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in dict.fromkeys(os.fsdecode(name).rstrip("/") for name in listed.split(b"\0")[:-1]):
        if (root / name / ".git").exists():  # a submodule, or a repository that nobody has made one
            yield from (f"{name}/{inner}" for inner in _git_files(root / name))
        else:
            yield name


def _git_state(root: Path, excluded: Sequence[Path]) -> tuple[str, int, int]:
    """The commit, how many files differ from it, and how many are new."""
    status = _git(root, "status", "-z", "--porcelain=v2", "--branch", "--untracked-files=all", "--no-renames")
    revision, modified, untracked = "", 0, 0
    for line in map(os.fsdecode, status.split(b"\0")):
        if line.startswith("# branch.oid ") and not line.endswith("(initial)"):
            revision = line.removeprefix("# branch.oid ")
        elif line.startswith(("1 ", "u ")):
            modified += 1
        elif line.startswith("? "):
            untracked += not _within(root / line[2:], *excluded)
    return revision, modified, untracked


def _git(directory: Path, *arguments: str) -> bytes:
    """What a git command prints.

    Raises:
        ConfigError: it fails, or there is no git.
    """
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise ConfigError(f"the code to ship: {directory} is in a git repository, but there is no git here") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ConfigError(f"the code to ship: git cannot read {directory}: {said}") from None


def _plain_files(root: Path, excluded: Sequence[Path]) -> Iterator[str]:
    """The files below `root` as paths from it, without those in hidden folders, caches and virtual environments."""
    for folder, folders, files in os.walk(root, onerror=_refuse_unreadable):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and _holds_code(here / name, excluded)]
        yield from (str((here / name).relative_to(root)) for name in (*files, *linked))


def _holds_code(folder: Path, excluded: Sequence[Path]) -> bool:
    hidden = folder.name.startswith(".") or folder.name == "__pycache__"
    environment = (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists()
    return not (hidden or environment or _within(folder, *excluded))


def _sizes(root: Path, names: Iterable[str], excluded: Sequence[Path]) -> dict[str, int]:
    """The size of each file and link that is there, in bytes."""
    sizes: dict[str, int] = {}
    real: dict[Path, bool] = {}  # folder -> whether it is one, and not what a link that has taken its place points to
    for name in names:
        path = root / name
        if path.parent not in real:
            real[path.parent] = os.path.realpath(path.parent) == str(path.parent)
        if real[path.parent] and os.path.lexists(path) and not _within(path, *excluded):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                sizes[name] = found.st_size
    return sizes


def _replace(root: Path, destination: Path, names: Iterable[str], directory: Path) -> None:
    """Copies files under a temporary name, which then becomes `destination`."""
    temporary, earlier = (destination.with_name(f".{destination.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
    try:
        (temporary / directory).mkdir(parents=True)  # even if it is empty: the job may start there
        for name in names:
            source, target = root / name, temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy(source, target, follow_symlinks=False)
            except PermissionError as error:
                _refuse_unreadable(error)
        if destination.exists():
            destination.rename(earlier)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def _refuse_unreadable(error: OSError) -> None:
    raise ConfigError(f"the code to ship: {error.filename} cannot be read: {error.strerror}") from error


def _too_large(root: Path, sizes: dict[str, int], total: int) -> str:
    """What to say of a tree that is too large: where the bytes are, small files summed up by folder."""
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        entries[name if size > MAX_BYTES / 100 else f"{Path(name).parent}/"] += size
    largest = "".join(f"\n  {_size(size):>8}  {name}" for name, size in entries.most_common(5))
    return (
        f"the code to ship: {root} has {_size(total)} in {_count(len(sizes), 'file')}, and at most {_size(MAX_BYTES)} "
        f"travel with a run; list in .gitignore what the job does not import. The largest:{largest}"
    )


def _folders_of_loaded_modules() -> Iterator[Path]:
    """Where the modules of this process were found, whatever way an editable installation has of pointing there."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and "." not in name and name != "__main__":
            yield Path(file).parent.parent if hasattr(module, "__path__") else Path(file).parent


def _within(path: Path, *folders: Path) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _size(size: float) -> str:
    """Bytes in decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
