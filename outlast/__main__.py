"""``python -m outlast.cli``: the command line where no entry point is installed."""

import sys

from outlast.cli.main import main

sys.exit(main())
