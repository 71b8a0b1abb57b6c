"""`python -m tasks.register promote NAME VERSION`."""

import sys

from tasks.register.command import main

sys.exit(main())
