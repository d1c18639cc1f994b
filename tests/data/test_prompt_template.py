from __future__ import annotations

import pytest

from fiddlehead.data.prompt_template import NEMO_TEMPLATE, PromptTemplate
from fiddlehead.errors import ConfigError


@pytest.mark.parametrize(
    ("template", "values", "prompt", "completion"),
    [
        ("{input} {output}", {"input": "2+2=", "output": "4"}, "2+2=", " 4"),
        ("{input} {output}", {"input": " 2+2= ", "output": " 4 "}, "2+2=", " 4"),
        ("{input}{output}", {"input": "a", "output": "b"}, "a", "b"),
        ("Q: {q}\nA: {a}", {"q": "why?", "a": "so"}, "Q: why?\nA:", " so"),
        ("{context}\n\n{q} {context} {a}", {"q": "x", "a": "y", "context": "c"}, "c\n\nx c", " y"),
        ("{input} {output}", {"input": "{output} {0.x}", "output": "{input}"}, "{output} {0.x}", " {input}"),
        ("{output}", {"output": "alone"}, "", "alone"),
    ],
)
def test_fields_are_filled_in_and_the_last_is_the_answer(
    template: str, values: dict[str, str], prompt: str, completion: str
) -> None:
    assert PromptTemplate(template).fill(values) == {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize("template", ["", "input output", "{input} {output}.", "{}", "{output} {input} {output}"])
def test_a_template_ends_with_the_answer_which_is_nowhere_else(template: str) -> None:
    with pytest.raises(ConfigError, match="prompt_template="):
        PromptTemplate(template)


def test_nemo_s_own() -> None:
    assert NEMO_TEMPLATE.fields == ("input", "output")
