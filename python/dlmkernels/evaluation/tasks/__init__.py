# SPDX-License-Identifier: Apache-2.0
"""Tasks for lm-eval that need no network: YAML files, and the modules that create and check the problems."""
