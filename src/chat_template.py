"""A model's chat template: rendered, looked at once, and given arguments."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.errors import UserError, one_line

Chat = list[dict[str, str]]

# So that a prompt is the same tomorrow. It stands before the template, in a line that leaves no trace in the text.
FIXED_DATE = "{% macro strftime_now(layout) %}26 Jul 2024{% endmacro %}\n"


def render_prompts(tokenizer: PreTrainedTokenizerBase, *ways: Sequence[Chat]) -> list[str]:
    """The text that asks each chat, up to where the reply begins. ways: the same chats put in other ways; the first one
    that the template takes counts.

    Raises:
        UserError: the template takes none: it fails, leaves out what a message says, differs from one
            time to the next, or does not end where the reply begins.
    """

    def render(chats: Sequence[Chat], asks: bool = True) -> list[str]:
        template = FIXED_DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(chats, chat_template=template, add_generation_prompt=asks, tokenize=False)

    for chats in ways:
        try:
            problem = _find_problem(render, chats[0], render(chats[:1])[0])
            prompts = render(chats)
        except Exception as error:  # whatever a template does with what it is given
            problem = f"cannot be rendered ({one_line(error)})"
        if not problem:
            return prompts
    advice = "mend it, choose another model, or try --template_arguments (enable_thinking=false, chat_template=NAME)"
    raise UserError(f"The chat template of '{tokenizer.name_or_path}' {problem}: {advice}.")


def _find_problem(render: Callable[..., list[str]], chat: Chat, prompt: str) -> str:
    """What is wrong with a prompt, or ""."""
    for message in chat:
        if message["content"].strip() not in prompt:
            return f"leaves out what the {message['role']} says"
    if render([chat]) != [prompt]:
        return "writes another prompt each time"
    [answered] = render([[*chat, {"role": "assistant", "content": "Yes."}]], asks=False)
    begun, whole = (re.sub(r"<think>\s*</think>", "", text).rstrip() for text in (prompt, answered))
    if not whole.startswith(begun) or not whole.removeprefix(begun).lstrip().startswith("Yes."):
        return f"does not end where the reply begins, but with {prompt[-40:]!r}"
    return ""


def set_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Sequence[str] | None) -> None:
    """Give variables of the chat template their values, `enable_thinking=false`; they are saved with the template,
    where they take the place of those saved before.

    A value is JSON, or else text. `chat_template=NAME` chooses one of several templates.

    Raises:
        UserError: one is not of this form, or there is no template to choose.
    """
    values: dict[str, Any] = dict(argument.partition("=")[::2] for argument in arguments or ())
    if not all(name.isidentifier() and value for name, value in values.items()):
        raise UserError(f"--template_arguments is {' '.join(values)}: write NAME=VALUE, as in enable_thinking=false.")
    if values:
        try:
            template = tokenizer.get_chat_template(values.pop("chat_template", None))
        except ValueError as error:
            raise UserError(f"--template_arguments cannot be given to this model ({one_line(error)}).") from error
        for name, text in values.items():
            with suppress(ValueError):  # it is text
                values[name] = json.loads(text)
        earlier = rf"{{% set ({'|'.join(values)}) = (?:(?!%}}).)* %}}\n"
        template = re.sub(r"\A({% set \w+ = (?:(?!%}).)* %}\n)+", lambda lines: re.sub(earlier, "", lines[0]), template)
        lines = (f"{{% set {name} = {value!r} %}}\n" for name, value in values.items())
        tokenizer.chat_template = "".join(lines) + template
