# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels info`."""

from .. import info


def add(commands) -> None:
    about = commands.add_parser(
        "info", help="show versions, the kernels in use and missing packages", description=info.__doc__
    )
    info.add_arguments(about)
    about.set_defaults(run=info.run)
