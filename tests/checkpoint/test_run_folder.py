"""Run folders under the things that happen to them: kills, full disks, second writers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from l4cli.checkpoint import RunFolder, verify_manifest
from l4cli.errors import L4Error


def save(run: RunFolder, step: int, keep: int | None = None, size: int = 100) -> None:
    with run.writing(step, keep) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes([step % 256]) * size)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name != ".lock")


def forked(work: Callable[[], None]) -> int:
    """Run something in a process of its own, and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_step_appears_whole_and_latest_names_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        with run.writing(500) as folder:
            (folder / "l4").mkdir()
            (folder / "l4/state.json").write_text("{}")
            assert run.steps() == []
            assert run.latest() is None
        assert run.steps() == [500]
    link = tmp_path / "run/latest"
    assert os.readlink(link) == "step-000500"
    assert RunFolder(tmp_path / "run").latest() == tmp_path / "run/step-000500"
    assert verify_manifest(link.resolve()) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        for step in (1, 2, 3, 1_000_000):
            save(run, step, keep=2)
    assert names(tmp_path) == ["latest", "step-000003", "step-1000000"]


def test_pruning_spares_what_latest_names(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        for step in (1, 2, 3):
            save(run, step)
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to("step-000001")
        run.prune(1)
        assert run.steps() == [1, 3]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        save(run, 7, size=10)
        save(run, 7, size=20)
    assert (tmp_path / "step-000007/model.safetensors").stat().st_size == 20
    assert names(tmp_path) == ["latest", "step-000007"]


def test_second_process_is_refused_and_told_who(tmp_path: Path) -> None:
    code = "import sys; from l4cli.checkpoint import RunFolder; RunFolder(sys.argv[1]).lock()"
    command = [sys.executable, "-c", code + "; print('held', flush=True); input()", str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(L4Error) as caught:
        RunFolder(tmp_path).lock()
    assert f"process {holder.pid}" in caught.value.why
    assert caught.value.exit_code == 1
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with RunFolder(tmp_path):
        pass  # a killed process leaves no stale lock


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    worker_id = tmp_path / "worker"

    def hold() -> None:
        RunFolder(tmp_path / "run").lock()
        worker = forked(lambda: time.sleep(60))
        worker_id.with_suffix(".tmp").write_text(str(worker))
        worker_id.with_suffix(".tmp").rename(worker_id)
        time.sleep(60)

    holder = forked(hold)
    while not worker_id.exists():
        time.sleep(0.01)
    with pytest.raises(L4Error):
        RunFolder(tmp_path / "run").lock()
    kill(holder)
    with RunFolder(tmp_path / "run"):
        os.kill(int(worker_id.read_text()), signal.SIGKILL)


def save_for_ever(path: Path) -> None:
    with RunFolder(path) as run:
        last = (run.steps() or [0])[-1]
        for step in range(last + 1, last + 10_000):
            with run.writing(step, keep=2) as folder:
                for name in ("config.json", "model.safetensors"):
                    (folder / name).write_bytes(str(step).encode() * 20_000)


def test_kill_at_any_instant_leaves_a_whole_latest(tmp_path: Path) -> None:
    for round_number in range(40):
        saver = forked(lambda: save_for_ever(tmp_path))
        while not (tmp_path / "latest").exists():
            time.sleep(0.001)
        time.sleep(0.0017 * round_number)
        kill(saver)
        with RunFolder(tmp_path) as run:
            latest = run.latest()
            assert latest is not None
            assert not [name for name in names(tmp_path) if name.startswith(".")]
            assert all(verify_manifest(run.step_folder(step)) == [] for step in run.steps())
    with RunFolder(tmp_path) as run:
        save(run, run.steps()[-1] + 1, keep=2)
        assert len(run.steps()) == 2


def test_leftovers_of_a_killed_save_are_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path) as run:
        save(run, 1)
    (tmp_path / ".step-000002.tmp/l4").mkdir(parents=True)
    (tmp_path / ".latest.tmp-123").symlink_to("step-000002")
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")  # between two renames
    (tmp_path / ".mine").write_text("not ours to remove")
    with RunFolder(tmp_path) as run:
        assert run.latest() == tmp_path / "step-000001"
    assert names(tmp_path) == [".mine", "latest", "step-000001"]
    assert ".step-000002.tmp" in capsys.readouterr().err


def test_latest_that_points_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path) as run:
        save(run, 1)
        save(run, 2)
    for step in (2, 1):
        (tmp_path / "step-000001").rename(tmp_path / "hidden") if step == 1 else None
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to("step-000009")
        assert RunFolder(tmp_path).latest() == tmp_path / "step-000002"
        with RunFolder(tmp_path):
            assert os.readlink(tmp_path / "latest") == "step-000002"
        assert "`step-000009`, which is gone" in capsys.readouterr().err
    (tmp_path / "step-000002").rename(tmp_path / "also-hidden")
    with RunFolder(tmp_path) as run:
        assert run.latest() is None
    assert not (tmp_path / "latest").is_symlink()


def test_a_save_that_fails_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        save(run, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(L4Error) as caught:
                save(run, 2, keep=1, size=100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot save step 2" in caught.value.what
        assert "step-000001` is whole" in caught.value.why
        assert names(tmp_path) == ["latest", "step-000001"]
        assert verify_manifest(tmp_path / "step-000001") == []
        save(run, 2, keep=1)
        assert run.steps() == [2]


def test_full_disk_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        with pytest.raises(L4Error) as caught, run.writing(1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.why.startswith("no space left on device, ")
        assert "free" in caught.value.why


def test_a_fault_of_ours_is_not_dressed_up(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        with pytest.raises(ZeroDivisionError), run.writing(1):
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), run.writing(1):
            raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(L4Error, match="it is a file"):
        RunFolder(tmp_path / "run").lock()


def test_a_read_only_place_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises((OSError, L4Error)):
        RunFolder("/proc/l4-run").lock()
