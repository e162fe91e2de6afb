"""Bit widths of all layers by integer programming: the best policy, many of them, and why one is the best."""

from nncf_mpq_plugin.allocation.constraints import BitsConstraint
from nncf_mpq_plugin.allocation.explain import BudgetReport, Explanation, Step, WhatIf, explain, what_if
from nncf_mpq_plugin.allocation.search import Solution, achieved_by, objective_of, search
from nncf_mpq_plugin.allocation.sweep import Sweep, draw, pareto

__all__ = [
    "BitsConstraint",
    "BudgetReport",
    "Explanation",
    "Solution",
    "Step",
    "Sweep",
    "WhatIf",
    "achieved_by",
    "draw",
    "explain",
    "objective_of",
    "pareto",
    "search",
    "what_if",
]
