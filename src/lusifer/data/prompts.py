"""Instructions in front of queries."""

from __future__ import annotations


def with_instruction(instruction: str | None, query: str) -> str:
    """A query behind its task instruction; documents carry none (E5-Mistral, arXiv 2401.00368, section 3.1)."""
    return f"Instruct: {instruction}\nQuery: {query}" if instruction else query
