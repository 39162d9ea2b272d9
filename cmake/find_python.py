# SPDX-License-Identifier: Apache-2.0
"""Print what the build needs to know about the interpreter that runs this: TAG;SUFFIX;INCLUDE, as in
`cp311;.cpython-311-x86_64-linux-gnu.so;/usr/include/python3.11`.
"""

import os
import sys
import sysconfig


def describe():
    """Return (wheel tag, suffix of extension modules, folder of Python.h), or exit with what is missing."""
    if sys.implementation.name != "cpython" or sys.version_info < (3, 10):
        sys.exit(f"CPython 3.10 or newer is needed; this is {sys.implementation.name} {sys.version.split()[0]}")
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        sys.exit(
            f"Python.h is missing in {include}: install the development files of this Python "
            f"(Debian, Ubuntu: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev; "
            f"Fedora: dnf install python3-devel)"
        )
    return f"cp{sys.version_info[0]}{sys.version_info[1]}", sysconfig.get_config_var("EXT_SUFFIX"), include


if __name__ == "__main__":
    sys.stdout.write(";".join(describe()))
