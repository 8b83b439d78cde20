"""What stands in front of a text when it is embedded: one rule, whoever embeds it.

Of a model's prompts, ``query`` stands in front of queries and ``document`` (or ``passage``, or ``corpus``) in front of
documents. Sentence Transformers' ``encode_query`` and ``encode_document`` apply them; `prompt_for` chooses the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from lusifer.errors import LusiferError

Role = Literal["query", "document"]
_NAMES: dict[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


class Prompted(Protocol):
    """A model with prompts; a Sentence Transformers model is one."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompts by name."""

    @property
    def default_prompt_name(self) -> str | None:
        """Name of the prompt of a text whose role has none."""


def prompt_for(model: Prompted, role: Role | None, *, prompt: str | None = None, prompt_name: str | None = None) -> str:
    """The prompt of a text: ``prompt``, that named ``prompt_name``, that of the role, the model's default, or "".

    As in Sentence Transformers, the first name of a role that the model knows counts, even if its prompt is empty; its
    models know ``query`` and ``document`` from the start.

    Args:
        model: The model.
        role: What the text is: a query, a document, or neither (None).
        prompt: A prompt that holds whatever the model has.
        prompt_name: Name of one of the model's prompts.

    Raises:
        LusiferError: If the model has no prompt of that name.
    """
    if prompt is not None:
        return prompt
    prompts = model.prompts or {}
    if prompt_name is not None:
        if prompt_name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise LusiferError(f"the model has no prompt {prompt_name[:60]!r}; there are {known}")
        return prompts[prompt_name]
    name = next((name for name in _NAMES.get(role or "", ()) if name in prompts), model.default_prompt_name)
    return prompts.get(name, "") if name is not None else ""


def explicit_prompt(prompt: str | None, instruction: str | None) -> str | None:
    """The prompt that a caller asked for, as such or as a task instruction.

    Args:
        prompt: The prompt.
        instruction: See `with_instruction`.

    Raises:
        LusiferError: If both are given.
    """
    if prompt is not None and instruction is not None:
        raise LusiferError("an instruction is a prompt: give either --prompt or --instruction")
    return with_instruction(instruction, "") if instruction else prompt


def with_instruction(instruction: str | None, query: str) -> str:
    """A query behind its task instruction; documents carry none (E5-Mistral, arXiv 2401.00368, section 3.1).

    Args:
        instruction: Nothing stands in front of the query when it is empty or None.
        query: The query.
    """
    return f"Instruct: {instruction}\nQuery: {query}" if instruction else query
