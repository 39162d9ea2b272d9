# SPDX-License-Identifier: Apache-2.0
"""Batch jobs: decode a file of prompts into a file of answers, with any number of processes."""

from .answers import answers as answers
from .job import Job as Job
from .lines import Line as Line
from .lines import LineError as LineError
from .lines import read_line as read_line

__all__ = ["Job", "Line", "LineError", "answers", "read_line"]
