"""The detection of files that look like secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiddlehead.files import secret_files

HEADER = "-----BEGIN {}PRIVATE KEY{}-----\n"  # in two parts, or this file would have a key in it


@pytest.mark.parametrize(
    "path",
    [
        ".env", ".env.local", ".ENV", "deploy/prod.env", ".envs/production/django", ".netrc", "a/_netrc", "id_rsa",
        "keys/id_ed25519", "server.pem", "server.KEY", "store.p12", "credentials", "credentials.json",
        "aws/credentials.csv", ".aws/config", "home/.ssh/known_hosts", ".kube/cache/x.py", "my-service-account-1.json",
    ],
)  # fmt: skip
def test_secrets_are_known_by_their_names(path: str) -> None:
    assert secret_files.pattern(path)


@pytest.mark.parametrize(
    "path",
    [
        "train.py", "env.py", "environment.yml", "credentials.py", "keys.py", "key/value.txt", "monkey.txt",
        ".github/ci.yml", ".gitignore", "tokenizer.json", "service.json", "netrc.md",
    ],
)  # fmt: skip
def test_other_files_are_not_taken_for_secrets(path: str) -> None:
    assert secret_files.pattern(path) == ""


@pytest.mark.parametrize(("kind", "end"), [("", ""), ("RSA ", ""), ("OPENSSH ", ""), ("PGP ", " BLOCK")])
def test_a_private_key_is_known_whatever_its_file_is_called(kind: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x\n" * 10_000 + HEADER.format(kind, end))
    (tmp_path / "account.json").write_text('{"private_key": "' + HEADER.format(kind, end).strip() + '\\nMII"}')
    (tmp_path / "public.txt").write_text(HEADER.format(kind, end).replace("PRIVATE", "PUBLIC"))
    found = [bool(secret_files.why(tmp_path, name)) for name in ("notes.txt", "account.json", "public.txt")]
    assert found == [True, True, False]


def test_the_table_of_secret_names_is_not_a_secret() -> None:
    for file in (Path(secret_files.__file__), Path(__file__)):
        assert not secret_files.why(file.parent, file.name)
