"""Logs of samples and of jobs, as tests write them."""

from kit.run import Journal
from kit.valley.jobs import DONE


def sample(question="q0", verdict="correct", **fields):
    """Return a row of a log of samples; `fields` replace those that a test is about."""
    row = {
        "question": question, "sample": 0, "problem": "1?", "answer": "1", "gold": "1", "prediction": "1",
        "rule": "text", "verdict": verdict, "tokens": 10, "finished": True, "text": "so \\boxed{1}",
    }  # fmt: skip
    return row | fields


def write_samples(path, rows, header=()):
    """Write a log of samples, and return its path."""
    journal = Journal(path)
    for row in ({"header": dict(header)}, *rows):
        journal.append(row)
    return path


def outcome(job, status=DONE, **fields):
    """Return a row of a study's journal."""
    return {"job": job, "status": status, "seconds": 1.0, "error": "", "tail": [], "log": ""} | fields
