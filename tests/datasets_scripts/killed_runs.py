"""A command that is killed three times on its way."""

import contextlib
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil


def kill_thrice(command: list[str], marks: Path, rng: np.random.Generator, *, tasks_too: bool) -> list[int]:
    """Starts a command three times and kills it at random moments; how many tasks were complete after each.

    marks      folder of completed tasks, of which fewer than ten are waited for
    tasks_too  kills the processes of its tasks as well, which else must end by themselves
    """
    completed = []
    for wanted in sorted(rng.choice(10, size=3, replace=False)):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
            while driver.poll() is None and (not marks.exists() or len(list(marks.iterdir())) < wanted):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.2))
            assert driver.poll() is None, "ended before it was killed"
            processes = psutil.Process(driver.pid).children(recursive=True)
            driver.kill()
            for process in processes if tasks_too else []:
                # It may have ended since
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            driver.wait()
        assert not psutil.wait_procs(processes, timeout=20)[1], "tasks outlive their driver"
        completed.append(len(list(marks.iterdir())))
    return completed
