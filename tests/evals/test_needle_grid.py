"""The grid, its controls, straddled needles and resuming, against plain recomputation."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from evals.needle_parts import HARD, PerfectReader, has_depth, make_sample

from l4cli.data.longcontext.sample import Sample
from l4cli.errors import L4Error, UsageError
from l4cli.evals.needle import (
    GridOptions,
    Reading,
    ResultsStore,
    Role,
    collect_cells,
    outcomes_of,
    plan_jobs,
    run_grid,
    score_answer,
)
from l4cli.evals.needle.store import require_usable
from l4cli.evals.needle.summary import summarize

OPTIONS = GridOptions(
    tasks=("single",), lengths=(64, 256), depths=(0.0, 50.0, 100.0), num_samples=4
)


def jobs_of(options: GridOptions) -> list:
    return plan_jobs(options, has_depth, HARD)


def read_all(folder: Path, reader: PerfectReader, options: GridOptions = OPTIONS) -> ResultsStore:
    store = ResultsStore.open(folder, {"lengths": options.lengths})
    run_grid(jobs_of(options), make_sample, reader, store)
    return store


def test_a_perfect_reader_is_right_everywhere_but_in_the_controls(tmp_path: Path) -> None:
    store = read_all(tmp_path, PerfectReader())
    summary = summarize(store.records, OPTIONS, HARD)
    assert summary["means_by_task"] == {"single": 1.0}
    assert summary["means_by_length"] == {"64": 1.0, "256": 1.0}
    assert summary["effective_length"]["ruler"] == summary["effective_length"]["nolima"] == 256
    assert {(c["length"], c["depth"]) for c in summary["cells"]} == {
        (length, depth) for length in (64, 256) for depth in (0.0, 50.0, 100.0)
    }
    assert all(c["num_correct"] == c["num_samples"] == 4 for c in summary["cells"])
    controls = summary["controls"]
    # One text a length with three questions; four texts' questions without any text.
    assert controls["no_needle"]["num_samples"] == 6
    assert controls["closed_book"]["num_samples"] == 12
    assert controls["no_needle"]["num_correct"] == controls["closed_book"]["num_correct"] == 0
    assert controls["distractors"]["num_correct"] == controls["distractors"]["num_samples"] == 24
    assert controls["distractors"]["tasks"] == ["multi-key-full"]


def test_straddled_needles_are_counted_by_plain_positions(tmp_path: Path) -> None:
    chunk = 16
    options = GridOptions(("single",), (64, 256), tuple(range(0, 101, 5)), 4, has_controls=False)
    store = read_all(tmp_path, PerfectReader(chunk, is_cut_by_borders=True), options)
    expected = 0
    for job in jobs_of(options):
        sample = make_sample(job)
        for question in sample.questions:
            start = 1 + len("".join(sample.pieces[: question.evidence[0]]).encode())
            places = range(start, start + len(sample.pieces[question.evidence[0]]))
            expected += len({place // chunk for place in places}) > 1
    total = 2 * 4 * 21
    straddled = summarize(store.records, options, HARD)["straddled"]
    assert 0 < expected < total
    assert straddled["num_straddled"] == expected
    assert straddled["num_straddled_correct"] == 0
    assert straddled["num_whole"] == straddled["num_whole_correct"] == total - expected
    cells = collect_cells(outcomes_of(store.records))
    assert sum(cell.as_event()["num_straddled"] for cell in cells) == expected
    assert sum(cell.num_correct for cell in cells) == total - expected


def test_a_cut_off_grid_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = read_all(tmp_path / "whole", PerfectReader())
    jobs = jobs_of(OPTIONS)

    class Stops(PerfectReader):
        def read(self, sample):
            if self.num_read == 5:
                raise KeyboardInterrupt
            return super().read(sample)

    with pytest.raises(KeyboardInterrupt):
        read_all(tmp_path / "cut", Stops())
    results = tmp_path / "cut" / "results.jsonl"
    lines = results.read_text().splitlines()
    assert len(lines) == 5
    results.write_text("\n".join([*lines, lines[0][:40]]))  # killed while it wrote the sixth
    reader = PerfectReader()
    store = read_all(tmp_path / "cut", reader)
    assert reader.num_read == len(jobs) - 5
    untimed = [{k: v for k, v in r.items() if k != "time_s"} for r in store.records]
    assert untimed == [{k: v for k, v in r.items() if k != "time_s"} for r in whole.records]
    on_disk = [json.loads(line) for line in results.read_text().splitlines()]
    assert on_disk == store.records
    again = PerfectReader()
    read_all(tmp_path / "cut", again)
    assert again.num_read == 0


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    ResultsStore.open(tmp_path, {"lengths": (64, 256), "seed": 0})
    ResultsStore.open(tmp_path, {"lengths": [64, 256], "seed": 0})
    with pytest.raises(UsageError) as refused:
        ResultsStore.open(tmp_path, {"lengths": [64], "seed": 0})
    assert refused.value.why == "`lengths` was 64,256, now 64"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="belongs to something else"):
        require_usable(tmp_path, fresh=False)
    with pytest.raises(UsageError, match="it is a file"):
        require_usable(tmp_path / "notes.txt", fresh=False)
    ResultsStore.open(tmp_path / "results", {})
    require_usable(tmp_path / "results", fresh=False)
    with pytest.raises(UsageError, match="--fresh"):
        require_usable(tmp_path / "results", fresh=True)


def test_damage_inside_the_results_is_told_not_skipped(tmp_path: Path) -> None:
    read_all(tmp_path, PerfectReader())
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join([lines[0], "{}\n", *lines[1:]]))
    with pytest.raises(L4Error, match="line 2"):
        read_all(tmp_path, PerfectReader())


def test_one_needle_a_text_when_asked_for() -> None:
    options = GridOptions(("single", "count"), (64,), (0.0, 100.0), 3, is_separate=True)
    tests = [job for job in jobs_of(options) if job.role is Role.test]
    assert [job.depths for job in tests] == [(0.0,), (100.0,)] * 3 + [()] * 3
    keys = [job.key for job in jobs_of(options)]
    assert len(set(keys)) == len(keys)
    seeds = {tuple(job.seed(0)) for job in tests}
    assert len(seeds) == len(tests)


def test_a_control_reads_the_text_of_its_test() -> None:
    jobs = jobs_of(OPTIONS)
    control = next(job for job in jobs if job.role is Role.no_needle)
    tested = next(job for job in jobs if job.role is Role.test and job.length == control.length)
    assert control.seed(1) == tested.seed(1)


def test_hard_needles_are_not_read_twice() -> None:
    options = GridOptions(("single", "multi-key-full"), (64,), (50.0,), 2)
    jobs = jobs_of(options)
    assert not any(job.role is Role.distractors for job in jobs)
    records = []

    class Collecting:
        finished = frozenset()

        def append(self, record):
            records.append(record)

    run_grid(jobs, make_sample, PerfectReader(), Collecting())
    distractors = summarize(records, options, HARD)["controls"]["distractors"]
    assert distractors["num_samples"] == distractors["num_correct"] == 2


def test_free_speech_is_searched_for_the_answer_as_a_word() -> None:
    question = make_sample(jobs_of(OPTIONS)[0]).questions[0]
    value = question.answers[0]
    assert score_answer(question, f"It is {value}.", speaks_freely=True) == 1.0
    assert score_answer(question, f"It is {value}7.", speaks_freely=True) == 0.0
    assert score_answer(question, f"It is {value}.", speaks_freely=False) == 0.0
    assert score_answer(question, f"{value};", speaks_freely=False) == 1.0


class SlowReader(PerfectReader):
    """Waits until three texts are under way: it cannot go on alone."""

    def __init__(self) -> None:
        super().__init__()
        self.others = threading.Barrier(3, timeout=30)

    def read(self, sample: Sample) -> Reading:
        self.others.wait()
        return super().read(sample)


def test_texts_at_once_give_the_same_records_in_the_same_order(tmp_path: Path) -> None:
    options = replace(OPTIONS, num_samples=2)
    jobs = jobs_of(options)
    assert len(jobs) % 3 == 0
    told: list[str] = []
    kept = {}
    for num_at_once, reader in ((1, PerfectReader()), (3, SlowReader())):
        store = ResultsStore.open(tmp_path / str(num_at_once), {})
        run_grid(
            jobs,
            make_sample,
            reader,
            store,
            num_at_once=num_at_once,
            after_job=lambda job: told.append(job.key),
        )
        kept[num_at_once] = [record | {"time_s": 0} for record in store.records]
    assert kept[1] == kept[3]
    assert told == 2 * [job.key for job in jobs]


def test_what_was_read_before_a_failure_is_kept(tmp_path: Path) -> None:
    class Failing(PerfectReader):
        def read(self, sample: Sample) -> Reading:
            if self.num_read == 4:
                raise L4Error("no more", why="four are enough", fix="none")
            return super().read(sample)

    jobs = jobs_of(OPTIONS)
    store = ResultsStore.open(tmp_path / "report", {})
    with pytest.raises(L4Error, match="four are enough"):
        run_grid(jobs, make_sample, Failing(), store, num_at_once=2)
    assert 3 <= len(store.finished) <= 5
    run_grid(jobs, make_sample, PerfectReader(), store, num_at_once=2)
    assert store.finished == {job.key for job in jobs}
