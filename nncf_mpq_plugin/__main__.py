"""``python -m nncf_mpq_plugin`` is the ``nncf-mpq`` command."""

import sys

from nncf_mpq_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
