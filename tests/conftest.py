"""What several rooms' tests share: tiny shapes, oracles, the fixtures' place."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torchvision_schemas

torchvision_schemas.declare()

# A suite started in the background inherits an ignored Ctrl-C, and so would what it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def llama4_vocabulary() -> Path:
    """The real Llama 4 `tokenizer.model`; the test is skipped where it is absent."""
    default = Path(__file__).parents[1] / ".." / "shared" / "fixtures"
    folder = Path(os.environ.get("L4_FIXTURES", default))
    path = folder / "llama4-tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip("the real Llama 4 vocabulary is not on this machine (L4_FIXTURES)")
    return path
