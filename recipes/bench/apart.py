"""Run contestants in processes of their own: a peak of memory is a process's highest ever."""

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch


def in_a_process(function: Callable, *arguments):
    """Call a function in a new process, on as many threads as here, and return what it returns."""
    spawn, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments).result()


def has_trl() -> bool:
    """Return whether TRL is installed, and say so if it is not."""
    if importlib.util.find_spec("trl"):
        return True
    print("TRL is not installed (pip install trl): not compared")
    return False
