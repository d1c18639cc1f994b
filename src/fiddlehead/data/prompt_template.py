"""Prompt templates as NeMo has them: a text with fields of an example in braces, the last of which is the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fiddlehead.errors import ConfigError, Problem

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """A template such as `{input} {output}`; the text before the last field is the prompt.

    Raises:
        ConfigError: it has no field, does not end with one, or has the last one twice.
    """

    text: str

    def __post_init__(self) -> None:
        fields = _FIELD.findall(self.text)
        if not fields or not self.text.endswith(f"{{{fields[-1]}}}"):
            message = "must end with the field of the answer in braces, such as '{input} {output}'"
            raise ConfigError(Problem("prompt_template", self.text, message))
        if fields.count(fields[-1]) > 1:
            message = f"has the answer, {{{fields[-1]}}}, in the prompt too"
            raise ConfigError(Problem("prompt_template", self.text, message))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that an example must have, each once; the answer is the last."""
        return tuple(dict.fromkeys(_FIELD.findall(self.text)))

    def fill(self, values: Mapping[str, str]) -> dict[str, str]:
        """The `prompt` and the `completion` of an example; spaces around its fields are removed, as in NeMo."""
        answer = self.fields[-1]
        prompt = self.text.removesuffix(f"{{{answer}}}")
        # Spaces before the answer are part of what is learned, as the model that is asked writes them itself.
        stem = prompt.rstrip(" ")
        filled = _FIELD.sub(lambda field: values[field[1]].strip(" "), stem)
        return {"prompt": filled, "completion": prompt[len(stem) :] + values[answer].strip(" ")}


NEMO_TEMPLATE = PromptTemplate("{input} {output}")
"""NeMo's for examples that have `input` and `output`."""
