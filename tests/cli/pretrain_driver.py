"""Start `l4 pretrain` again and again, kill it at random instants, until it finishes by itself.

usage: python pretrain_driver.py SEED MAX_KILLS SAVING|ANY ARGS...
The heavy imports are done once; every attempt is a forked process that runs the real entry point.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import l4cli.checkpoint
import l4cli.cli
import l4cli.data.loader
import l4cli.training.run


def main(seed: int, max_kills: int, when: str, args: list[str]) -> int:
    rng = random.Random(seed)
    folder = Path(args[args.index("-o") + 1])
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            os._exit(l4cli.cli.main(["pretrain", *args]))
        is_killed = False
        if kills < max_kills:
            if when == "saving":
                is_killed = _wait_for_save(child, folder)
                time.sleep(rng.uniform(0.0, 0.03))
            else:
                time.sleep(rng.uniform(0.2, 1.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(f"kills {kills}", flush=True)
            return os.waitstatus_to_exitcode(status)
        kills += 1
        assert is_killed or when == "any"


def _wait_for_save(child: int, folder: Path) -> bool:
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if any(folder.glob(".step-*.tmp")):
            return True
        time.sleep(0.0005)
    return False


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
