"""A run as one HTML page that a person can look at, keep and send: no script, nothing loaded from elsewhere."""

from nncf_mpq_plugin.report.page import write_report

__all__ = ["write_report"]
