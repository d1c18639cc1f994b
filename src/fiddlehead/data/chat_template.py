"""A chat model's template: from messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template asks for."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers bring it along; rendered in a sandbox."""

    text: str
    special_tokens: Mapping[str, str]
    """Such as `bos_token`, by the names that templates use."""
    source: str = "chat_template"

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template beside a tokenizer: `chat_template.jinja`, or in `tokenizer_config.json`; None if there is none.

        Raises:
            ConfigError: the files cannot be read.
        """
        settings: dict[str, Any] = {}
        config, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            if config.is_file():
                settings = json.loads(config.read_text(encoding="utf-8"))
            text = own.read_text(encoding="utf-8") if own.is_file() else settings.get("chat_template")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: the chat template cannot be read: {error}") from error
        if isinstance(text, list):  # several by name
            text = next((each["template"] for each in text if each.get("name") == "default"), None)
        if not text:
            return None
        tokens = {name: value for name, value in settings.items() if name.endswith("_token") and value}
        contents = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
        strings = {name: value for name, value in contents.items() if isinstance(value, str)}
        return cls(text, strings, str(own if own.is_file() else config))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what comes before an answer.

        Raises:
            ConfigError: the template refuses the messages, or is broken.
        """
        import jinja2

        try:
            # Templates ask whether tools and documents are none, so they have to be there.
            return _compiled(self.text).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:  # the latter from what it computes
            raise ConfigError(f"{self.source}: {error}") from error

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """A conversation in pieces of text, each with whether it is an answer of the assistant's, its end included.

        What comes before an answer is the very text with which one is asked for.

        Raises:
            ConfigError: the template does not write a conversation as the beginning of a longer one.
        """
        pieces: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            question = self.render(messages[:number], add_generation_prompt=True)
            whole = self.render(messages[: number + 1])
            if not question.startswith(done) or not whole.startswith(question):
                raise ConfigError(
                    f"{self.source}: writes what came before otherwise once an answer follows, so that the answer "
                    "cannot be told apart"
                )
            pieces += [(question[len(done) :], False), (whole[len(question) :], True)]
            done = whole
        return pieces


@lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """The template, as transformers compiles it; that takes far longer than to render it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers' own masks; what is inside is text as any other."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a set of the instance's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def now(format: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment.from_string(text)
