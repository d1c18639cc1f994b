"""The code of a job: a copy of the working tree, made when the run is launched."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fiddlehead.errors import ConfigError
from fiddlehead.files import secret_files
from fiddlehead.files.atomic import write_atomically
from fiddlehead.launch import secrets
from fiddlehead.recipe import project
from fiddlehead.run.directory import RunDirectory

MAX_BYTES = 200_000_000
"""The most that is shipped: more is data or checkpoints, and would slow every launch."""
SHOWN = 5
"""The most left-out files to name in a line."""
HIDDEN = "hidden, and not in git's index"
"""Why a hidden file is left out."""


@dataclass(frozen=True)
class CodeCopy:
    """What was shipped with a run, as saved in `RUN/code.json`."""

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
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that would have been shipped, but look like secrets or are hidden; the values say why."""

    def counterpart(self, path: Path) -> Path:
        """The place in the copy that corresponds to `path` in the working tree."""
        return self.path / Path(os.path.realpath(path)).relative_to(self.root)

    def python_path(self) -> list[str]:
        """The folders of the copy to import from, instead of the working tree's folders on this process's path.

        Every kind of editable installation is included. An environment with its packages is not included, nor is the
        working directory, which a job searches last, unless PYTHONPATH names it.
        """
        folders = [*map(Path, filter(None, sys.path)), *_folders_of_loaded_modules()]
        found = dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders)
        if not project.comes_first(self.directory):
            found.pop(self.directory, None)
        inside = [folder for folder in found if _within(folder, self.root) and "site-packages" not in folder.parts]
        return [str(copied) for folder in inside if (copied := self.counterpart(folder)).is_dir()]

    def describe(self) -> str:
        """Describes the copy in one line, for the user."""
        text = f"shipped {_count(self.files, 'file')}, {_size(self.bytes)}"
        changes = [_count(self.modified, "modified file")] if self.modified else []
        changes += [_count(self.untracked, "new file")] if self.untracked else []
        if not self.revision:
            text += ", at no git revision"
        else:
            text += f", revision {self.revision[:7]}" + (f" with {' and '.join(changes)}" if changes else "")
        return "; ".join(filter(None, (text, self.describe_left_out())))

    def describe_left_out(self) -> str:
        """Describes the files that were left out, for the user; "" if there are none."""
        names = [f"{name} ({reason})" for name, reason in self.left_out.items()]
        more = [f"{len(names) - SHOWN:,} more (code.json lists them)"] if len(names) > SHOWN else []
        return f"left out: {', '.join([*names[:SHOWN], *more])}" if names else ""


def ship(directory: Path, destination: Path, *, exclude: Sequence[Path] = ()) -> CodeCopy:
    """Copies the working tree that contains `directory`, and replaces an earlier copy.

    In a git repository, it copies the files that git tracks, with uncommitted changes, and new files that git does not
    ignore, also in submodules. Elsewhere, it copies `directory` without caches and virtual environments. Links stay
    links. Hidden files, and files in hidden folders, are shipped only if git tracks them. Files that look like secrets
    are never shipped.

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
    listed = _git_files(root) if git_root else dict.fromkeys(_plain_files(root, excluded), False)
    sizes = _sizes(root, listed, excluded)
    left_out = {name: HIDDEN for name in sizes if _hidden(name) and not listed[name]}
    left_out |= {name: f"looks like a secret: {found}" for name in sizes if (found := secret_files.pattern(name))}
    sizes = {name: size for name, size in sizes.items() if name not in left_out}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        raise ConfigError(_too_large(root, sizes, total))
    keys = _files_with_keys(root, sizes)
    sizes = {name: size for name, size in sizes.items() if name not in keys}
    left_out |= keys
    _replace(root, destination, [*sizes], directory.relative_to(root))
    state = _git_state(root, [*excluded, *(root / name for name in left_out)]) if git_root else ("", 0, 0)
    copy = CodeCopy(root, destination, directory, len(sizes), sum(sizes.values()), *state, left_out)
    write_atomically(destination.with_name("code.json"), json.dumps(vars(copy), default=str, indent=1) + "\n")
    return copy


def shipped(run: RunDirectory) -> CodeCopy | None:
    """Returns what was shipped with a run; None if its job imports the working tree itself."""
    try:
        recorded = json.loads(run.code.with_name("code.json").read_text())
    except FileNotFoundError:
        return None
    return CodeCopy(**{**recorded, **{name: Path(recorded[name]) for name in ("root", "path", "directory")}})


def _git_root(directory: Path) -> Path | None:
    """The root of the git working tree that contains `directory`; None if there is none."""
    if not any((folder / ".git").exists() for folder in (directory, *directory.parents)):
        return None
    root = Path(os.fsdecode(_git(directory, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
    if subprocess.run(["git", "-C", str(directory), "check-ignore", "-q", str(directory)]).returncode == 0:
        raise ConfigError(f"the code to ship: git ignores {directory}; launch from elsewhere, or `git init` there")
    return root


def _git_files(root: Path) -> dict[str, bool]:
    """The files that git tracks or does not ignore, as paths from `root`, and whether git tracks each.

    For a repository inside `root`, its own rules hold.
    """
    tracked = _git(root, "ls-files", "-z", "--cached").split(b"\0")
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0")
    files: dict[str, bool] = {}
    for listed, is_tracked in ((new, False), (tracked, True)):
        for name in (os.fsdecode(each).rstrip("/") for each in listed[:-1]):
            # A submodule, or another repository inside this one; a hidden one of the latter is a cache.
            if (root / name / ".git").exists() and (is_tracked or not _hidden(name)):
                files |= {f"{name}/{inner}": inside for inner, inside in _git_files(root / name).items()}
            else:
                files[name] = is_tracked
    return files


def _hidden(name: str) -> bool:
    """Whether a file, or one of its folders, is hidden."""
    return any(part.startswith(".") for part in Path(name).parts)


def _files_with_keys(root: Path, names: Iterable[str]) -> dict[str, str]:
    """The files that contain a private key, each with that reason in words."""
    try:
        return {name: reason for name in names if (reason := secret_files.why(root, name))}
    except PermissionError as error:
        _refuse_unreadable(error)
        raise


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
            untracked += not (_hidden(line[2:]) or _within(root / line[2:], *excluded))
    return revision, modified, untracked


def _git(directory: Path, *arguments: str) -> bytes:
    """Returns the output of a git command.

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
    """The files below `root`, as relative paths, without hidden folders, caches and virtual environments."""
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
    """The size of each existing file and link, in bytes."""
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
    """The message for a tree that is too large: its largest files and folders, with small files summed by folder."""
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        entries[name if size > MAX_BYTES / 100 else f"{Path(name).parent}/"] += size
    largest = "".join(f"\n  {_size(size):>8}  {name}" for name, size in entries.most_common(5))
    return (
        f"the code to ship: {root} has {_size(total)} in {_count(len(sizes), 'file')}, and at most {_size(MAX_BYTES)} "
        f"travel with a run; list in .gitignore what the job does not import. The largest:{largest}"
    )


def _folders_of_loaded_modules() -> Iterator[Path]:
    """The folders of this process's modules, however an editable installation points to them."""
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
