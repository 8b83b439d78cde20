"""What the tests of bulk encoding share."""

from __future__ import annotations

import pytest

from lusifer.model.sentence_transformer import save_atomically


@pytest.fixture
def model(tiny_st, tmp_path):
    save_atomically(tiny_st, tmp_path / "model")
    return str(tmp_path / "model")
