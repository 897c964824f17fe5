"""`python -m kvik.cli`."""

import sys

from kvik.cli.app import main

sys.exit(main())
