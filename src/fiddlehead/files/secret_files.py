"""Detects files that look like secrets: they are neither shipped with a run nor recorded in its patch."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

NAMES = (
    # Settings of a program, with passwords and tokens in them.
    ".env*", "*.env", ".netrc", "_netrc", ".git-credentials", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", "kubeconfig",
    # Private keys, and what keeps several of them.
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx",
    "*.keystore",
    # Accounts at a cloud.
    "credentials*", "client_secret*", "*service_account*.json", "*service-account*.json",
    "application_default_credentials.json",
)  # fmt: skip
"""Patterns of a file's name, in lower case. Python's own source is never taken for a secret by its name."""
FOLDERS = (".aws", ".azure", ".docker", ".env*", ".gcloud", ".gnupg", ".kube", ".ssh", "gcloud")
"""Patterns of the names of folders; all that is within is taken for a secret."""
PRIVATE_KEY = "-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-[0-9]"
"""What every file with a private key has in it, as a regular expression; a service account's JSON file has one too."""


def pattern(path: str) -> str:
    """The pattern of `NAMES` or `FOLDERS` that a path, relative and with slashes, matches; "" if there is none."""
    *folders, name = (part.lower() for part in PurePosixPath(path).parts)
    found = [f"{each}/" for each in FOLDERS if any(fnmatchcase(folder, each) for folder in folders)]
    if not name.endswith((".py", ".pyi")):
        found += [each for each in NAMES if fnmatchcase(name, each)]
    return next(iter(found), "")


def has_private_key(content: bytes) -> bool:
    """Whether bytes of a file or a patch contain the header of a private key."""
    return re.search(PRIVATE_KEY.encode(), content) is not None


def why(root: Path, name: str) -> str:
    """Why the file `name` below `root` looks like a secret, in a few words; "" if it does not.

    For a link, the name counts, not its target.

    Raises:
        OSError: it cannot be read.
    """
    if matched := pattern(name):
        return f"looks like a secret: {matched}"
    path = root / name
    if path.is_file() and not path.is_symlink() and has_private_key(path.read_bytes()):
        return "has a private key in it"
    return ""
