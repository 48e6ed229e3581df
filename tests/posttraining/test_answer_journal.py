"""What was paid for stays, in whatever moment a run ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from l4cli.errors import L4Error, UsageError
from l4cli.posttraining.answer_journal import AnswerJournal, read_settings, require_usable

SETTINGS = {"prompts": "abc", "temperature": 1.0}


def record(name: str | int, sample: int = 0) -> dict[str, object]:
    return {"id": name, "sample": sample, "content": f"of {name}\n", "finish": "stop"}


def test_records_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    journal = AnswerJournal.open(tmp_path / "out", SETTINGS)
    keys = [("a", 1), ("a", 0), (7, 0), ("7", 0)]
    for key in keys:
        journal.append(record(*key))
    again = AnswerJournal.open(tmp_path / "out", SETTINGS)
    for found in (journal, again):
        assert len(found) == 4
        assert ("a", 0) in found
        assert ("a", 2) not in found
        wanted = [("7", 0), ("a", 0), ("b", 0), (7, 0)]
        read = [(row["id"], row["sample"]) for row in found.read(iter(wanted))]
        assert read == [("7", 0), ("a", 0), (7, 0)]


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    journal = AnswerJournal.open(tmp_path / "out", SETTINGS)

    def write(first: int) -> None:
        for i in range(first, first + 20):
            journal.append(record(i))

    threads = [threading.Thread(target=write, args=(20 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = AnswerJournal.open(tmp_path / "out", SETTINGS)
    assert [row["id"] for row in again.read((i, 0) for i in range(80))] == list(range(80))


def test_a_torn_last_line_is_taken_off(tmp_path: Path) -> None:
    journal = AnswerJournal.open(tmp_path / "out", SETTINGS)
    journal.append(record(1))
    whole = journal.path.read_bytes()
    for size in range(1, len(whole)):
        journal.path.write_bytes(whole + whole[:size])
        again = AnswerJournal.open(tmp_path / "out", SETTINGS)
        assert len(again) == 1
        assert journal.path.read_bytes() == whole
    again.append(record(2))
    assert len(AnswerJournal.open(tmp_path / "out", SETTINGS)) == 2


def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    journal = AnswerJournal.open(tmp_path / "out", SETTINGS)
    journal.append(record(1))
    journal.path.write_bytes(journal.path.read_bytes() + b"{}\n")
    with pytest.raises(L4Error) as caught:
        AnswerJournal.open(tmp_path / "out", SETTINGS)
    assert "line 2" in caught.value.why


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    AnswerJournal.open(tmp_path / "out", SETTINGS).append(record(1))
    with pytest.raises(UsageError) as caught:
        AnswerJournal.open(tmp_path / "out", SETTINGS | {"temperature": 0.5, "top_p": 0.9})
    assert caught.value.why == "`temperature` was 1.0, now 0.5; `top_p` was not set, now 0.9"
    require_usable(tmp_path / "out", fresh=False)
    require_usable(tmp_path / "new", fresh=True)
    with pytest.raises(UsageError):
        require_usable(tmp_path / "out", fresh=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError) as caught:
        require_usable(tmp_path / "else", fresh=False)
    assert "`thesis.txt`" in caught.value.why


def test_a_folder_without_answers_takes_other_settings(tmp_path: Path) -> None:
    """Whoever mistypes the name of a model goes on in the same folder."""
    out = tmp_path / "out"
    AnswerJournal.open(out, SETTINGS)
    AnswerJournal.open(out, SETTINGS | {"prompts": "def"})
    assert read_settings(out) == SETTINGS | {"prompts": "def"}


def test_who_only_reads_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert len(AnswerJournal.open(out, SETTINGS, only_reads=True)) == 0
    assert not out.exists()
    journal = AnswerJournal.open(out, SETTINGS)
    journal.append(record(1))
    journal.path.write_bytes(journal.path.read_bytes() + b'{"id": 2, "sam')
    before = journal.path.read_bytes()
    assert len(AnswerJournal.open(out, SETTINGS, only_reads=True)) == 1
    assert journal.path.read_bytes() == before
