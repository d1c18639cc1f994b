"""A chat model's template: from messages to the text that the model was trained on."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fiddlehead.data import template_process
from fiddlehead.data.special_tokens import SpecialTokens, read_settings
from fiddlehead.data.template_process import MEMORY, WATCHED
from fiddlehead.errors import ConfigError, Problem, kind_in_json

Message = Mapping[str, Any]
"""`role` and `content`, and other fields that a template uses."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers bring it along; rendered in a sandbox, in a process of its own."""

    text: str
    special_tokens: Mapping[str, str]
    """Such as `bos_token`, by the names that templates use."""
    source: str = "chat_template"
    tool_use: str | None = None
    """The template for conversations with tools, where it is another one."""

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template beside a tokenizer: `chat_template.jinja`, or in `tokenizer_config.json`; None if there is none.

        Raises:
            ConfigError: the files cannot be read.
        """
        config, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            text = own.read_text(encoding="utf-8") if own.is_file() else read_settings(config).get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem.in_file(own, f"cannot be read: {error}")) from error
        if isinstance(text, list):  # several by name
            text = {str(each.get("name")): each.get("template") for each in text if isinstance(each, dict)}
        tool_use = None
        if isinstance(text, dict):
            if "default" not in text:
                raise ConfigError(
                    Problem.in_file(config, f"chat_template has {', '.join(text)}; one of them must be named default")
                )
            text, tool_use = text["default"], text.get("tool_use")
        if not text:
            return None
        for each in (text, tool_use or ""):
            if not isinstance(each, str):
                raise ConfigError(
                    Problem.in_file(config, f"chat_template is {kind_in_json(each)}; must be text, or named texts")
                )
        return cls(text, SpecialTokens.read(folder).names, str(own if own.is_file() else config), tool_use)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what comes before an answer.
            tools: JSON schemas of the functions that the assistant can call.

        Raises:
            ConfigError: the template refuses the messages, is broken, or takes too long or too much memory.
        """
        variables = {
            "messages": messages,
            # Templates ask whether these are none, so they have to be there.
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }
        try:
            return _renderer.render(self.tool_use if tools and self.tool_use else self.text, variables)
        except (TypeError, ValueError) as error:
            raise ConfigError(Problem.in_file(self.source, str(error))) from error

    def answer(self, messages: Sequence[Message], number: int, tools: Sequence[Any] | None = None) -> tuple[str, str]:
        """The text that asks for the answer `messages[number]`, and the text that this answer ends.

        The latter begins with the former, and has no message after the answer: earlier messages are written as they
        are when the model is asked for this one.

        Raises:
            ConfigError: the template refuses the messages, or the answer does not begin with what asks for it.
        """
        whole = self.render(messages[: number + 1], tools=tools)
        if number:
            asked = self.render(messages[:number], add_generation_prompt=True, tools=tools)
        else:  # most templates cannot write a conversation without a message
            prompt = self._generation_prompt()
            asked = whole[: whole.index(prompt) + len(prompt)] if prompt in whole else prompt
        if not whole.startswith(asked):
            message = (
                f"asks for an answer with {asked[-40:]!r}, and does not write the answer after it, so that it "
                "cannot be learned"
            )
            raise ConfigError(Problem.in_file(self.source, message))
        return asked, whole

    def _generation_prompt(self) -> str:
        """The text after a question that asks for an answer."""
        question = [{"role": "user", "content": "?"}]
        plain, asked = self.render(question), self.render(question, add_generation_prompt=True)
        return asked[shared_length(plain, asked) :]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or items two texts or lists begin alike with."""
    same = (number for number, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)
    return next(same, min(len(one), len(other)))


LIMITED = sys.platform == "linux"
"""Whether the system limits the memory of a process that asks for it; macOS does not."""
_INTERPRETER = 64 << 20
"""Bytes that the process may have without a template."""


def _watch(process: subprocess.Popen[str]) -> None:
    """Waits until the process answers or ends, and kills it if it takes too much memory."""
    assert process.stdout
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        seen = psutil.Process(process.pid)
        while not select.select([process.stdout], [], [], 0.005)[0]:
            if seen.memory_info().rss > MEMORY + _INTERPRETER:
                process.kill()


class _Renderer:
    """A process that renders templates, started when it is first asked and ended with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text; raises ValueError, with the reason, where there is none."""
        # The variables are what JSON and Parquet files hold; of the latter, dates are not JSON and become text.
        request = json.dumps({"template": template, "variables": variables}, default=str)
        with self._lock:
            process = self._started()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                if not LIMITED:
                    _watch(process)
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # interrupted, its answer would be taken for that to the next question
                self.stop()
                raise
            if not line:
                took_long = self.stop() == -signal.SIGPROF
                raise ValueError("takes too long" if took_long else f"needs more than {MEMORY >> 20} MB")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def stop(self) -> int | None:
        """Ends the process, if this one has started it, and returns its exit code."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner != os.getpid():  # after a fork: it is the other's child
            self._process.returncode, self._process = 0, None
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", template_process.__file__, *([] if LIMITED else [WATCHED])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        return self._process


_renderer = _Renderer()
atexit.register(_renderer.stop)
