"""Needle tests: a grid of texts with questions, who answers them, what came of it."""

from l4cli.evals.needle.cells import Cell, Outcome, collect_cells, outcomes_of
from l4cli.evals.needle.grid import GridOptions, Job, Role, plan_jobs, run_grid
from l4cli.evals.needle.store import ResultsStore
from l4cli.evals.needle.subject import AnswersOnly, Reading, Subject, score_answer

__all__ = [
    "AnswersOnly",
    "Cell",
    "GridOptions",
    "Job",
    "Outcome",
    "Reading",
    "ResultsStore",
    "Role",
    "Subject",
    "collect_cells",
    "outcomes_of",
    "plan_jobs",
    "run_grid",
    "score_answer",
]
