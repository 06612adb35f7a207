"""Parts that workers of other libraries run; NumPy alone."""

import os
import sys
import time

import numpy as np


def work(z):
    return np.sin(z) * z.sum(1, keepdims=True)


def dies_once(folder, z):
    """The worker that gets the twentieth call is killed, in the middle of a backward pass."""
    open(os.path.join(folder, str(time.monotonic_ns())), "x").close()
    if len(os.listdir(folder)) >= 20:
        try:
            open(os.path.join(folder, "dead"), "x").close()
        except FileExistsError:
            return work(z)
        os.kill(os.getpid(), 9)
    return work(z)


def fails_once(folder, z):
    """Where it is asked to, once, when thirty calls have been answered since."""
    if len(os.listdir(folder)) > 40 + 4 + 44 + 31:
        try:
            os.unlink(os.path.join(folder, "fail"))
        except FileNotFoundError:
            pass
        else:
            time.sleep(0.3)  # what the other worker answers arrives before
            raise ValueError("once")
    open(os.path.join(folder, str(time.monotonic_ns())), "x").close()
    return work(z)


def wrong(z):
    raise ValueError("mine")


def hangs(z):
    time.sleep(8)


def nan(z):
    return np.full_like(z, np.nan)


def has_torch(z):
    return z * float("torch" in sys.modules)


def kills(z):
    """Every worker that gets here is killed."""
    os.kill(os.getpid(), 9)


def fails_to_start():
    raise OSError("no licence")
