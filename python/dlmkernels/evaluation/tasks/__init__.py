# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval that need no network: YAML files, and the modules beside them that make and check the problems."""
