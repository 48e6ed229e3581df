"""Files of prompts, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4cli.errors import L4Error
from l4cli.posttraining.prompts import read_prompts


def test_rows_of_both_shapes_are_read_and_other_keys_carried(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "What is 1 + 1?", "answer": 2, "level": "easy"},
        {
            "id": "b",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}],
                },
            ],
        },
    ]
    path.write_text("\ufeff" + json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]) + "\r\n")
    first, second = read_prompts(path).prompts
    assert first.id == 1
    assert first.messages == [{"role": "user", "content": "What is 1 + 1?"}]
    assert first.text == "What is 1 + 1?"
    assert first.answer == 2
    assert first.carried == {"answer": 2, "level": "easy"}
    assert second.id == "b"
    assert second.text is None
    assert second.messages[-1] == {"role": "user", "content": "Hi!"}
    assert read_prompts(path).digest == read_prompts(path).digest


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"question": "x"}', "no `messages`, no `prompt`"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "both"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": ["x"]}', "not a text"),
        ('{"messages": []}', "not a list with a message"),
        ('{"messages": ["x"]}', "message 1 is not a JSON object"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', '"robot"'),
        ('{"messages": [{"role": "user"}]}', "`content` of message 1"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "is not text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
        ('{"prompt": "x", "images": ["a.png"]}', "`images`"),
        ('{"prompt": "x", "checked": true}', "`checked`"),
        ('{"prompt": "x", "id": 1.5}', "`id`"),
        ('{"prompt": "x", "id": 1}', "that of line 1"),
        ('{"prompt": "half \\ud83d"}', "surrogate"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, row: str, told: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + row + "\n")
    with pytest.raises(L4Error) as caught:
        read_prompts(path)
    assert f"`{path}` line 2" in caught.value.what
    assert told in caught.value.why


def test_a_file_without_rows_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    for name in ("p.jsonl", "q.jsonl"):
        with pytest.raises(L4Error):
            read_prompts(tmp_path / name)
