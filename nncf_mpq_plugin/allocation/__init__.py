"""Bit widths of all layers by integer programming: the best policy, many of them, and why one is the best."""

from nncf_mpq_plugin.allocation.constraints import BitsConstraint
from nncf_mpq_plugin.allocation.explain import BudgetReport, Explanation, Step, WhatIf, explain, what_if
from nncf_mpq_plugin.allocation.search import Prepared, Solution, achieved_by, objective_of, prepare, search
from nncf_mpq_plugin.allocation.sweep import Sweep, draw, pareto

__all__ = [
    "BitsConstraint",
    "BudgetReport",
    "Explanation",
    "Prepared",
    "Solution",
    "Step",
    "Sweep",
    "WhatIf",
    "achieved_by",
    "draw",
    "explain",
    "objective_of",
    "pareto",
    "prepare",
    "search",
    "what_if",
]
