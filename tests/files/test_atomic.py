"""Files that are written completely or not at all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fiddlehead.files.atomic import write_atomically


def test_threads_that_write_one_file_leave_the_text_of_one_of_them(tmp_path: Path) -> None:
    file, begin = tmp_path / "status", threading.Barrier(4)

    def write(text: str) -> None:
        begin.wait()
        for _ in range(50):
            write_atomically(file, text)
            assert file.read_text() in texts

    texts = [letter * 1000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert [each.name for each in tmp_path.iterdir()] == ["status"]
