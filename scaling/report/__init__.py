"""What a run did, beside what was predicted of it before: in figures (figures.py), and as a page (page.py)."""

from scaling.report.figures import run_report

__all__ = ["run_report"]
