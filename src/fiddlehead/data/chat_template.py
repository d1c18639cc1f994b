"""A chat model's template: from messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fiddlehead.data.special_tokens import SpecialTokens, read_settings
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
            raise ConfigError(f"{own} cannot be read: {error}") from error
        if isinstance(text, list):  # several by name
            text = {str(each.get("name")): each.get("template") for each in text if isinstance(each, dict)}
        tool_use = None
        if isinstance(text, dict):
            if "default" not in text:
                raise ConfigError(f"{config}: chat_template has {', '.join(text)}; one of them must be named default")
            text, tool_use = text["default"], text.get("tool_use")
        if not text:
            return None
        for each in (text, tool_use or ""):
            if not isinstance(each, str):
                raise ConfigError(f"{config}: chat_template is a {type(each).__name__}; allowed: text, or named texts")
        return cls(text, SpecialTokens.read(folder).names, str(own if own.is_file() else config), tool_use)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what comes before an answer.
            tools: JSON schemas of the functions that the assistant can call.

        Raises:
            ConfigError: the template refuses the messages, or is broken.
        """
        import jinja2

        try:
            # Templates ask whether tools and documents are none, so they have to be there.
            return _compiled(self.tool_use if tools and self.tool_use else self.text).render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:  # the latter from what it computes
            raise ConfigError(f"{self.source}: {error}") from error

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
            raise ConfigError(
                f"{self.source}: asks for an answer with {asked[-40:]!r}, and does not write the answer after it, so "
                "that it cannot be learned"
            )
        return asked, whole

    def _generation_prompt(self) -> str:
        """What follows a question to ask for an answer."""
        question = [{"role": "user", "content": "?"}]
        plain, asked = self.render(question), self.render(question, add_generation_prompt=True)
        return asked[shared_length(plain, asked) :]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or items two texts or lists begin alike with."""
    same = (number for number, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)
    return next(same, min(len(one), len(other)))


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
