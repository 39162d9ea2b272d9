# SPDX-License-Identifier: Apache-2.0
"""Constraints from JSON schemas and regular expressions (docs/constraints.md). Needs the extra `grammar`."""

from .grammar import Grammar as Grammar
from .make import json_object as json_object
from .make import json_schema as json_schema
from .make import regex as regex
