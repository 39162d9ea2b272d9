# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels info`."""

from .. import info


def add(commands) -> None:
    about = commands.add_parser("info", help="versions, kernels in use, what is missing", description=info.__doc__)
    info.add_arguments(about)
    about.set_defaults(run=info.run)
