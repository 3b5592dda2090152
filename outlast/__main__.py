"""``python -m outlast VERB``: the command line where the ``outlast`` script is not on the PATH."""

import sys

from outlast.cli.main import main

sys.exit(main())
