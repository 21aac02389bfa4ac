"""`python -m server`."""

import sys

from server.parent import main

# Workers find their main function by its module's name, and this module has none in them.
if __name__ == "__main__":
    sys.exit(main())
