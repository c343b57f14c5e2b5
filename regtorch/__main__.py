"""Print the versions that a bug report needs: `python -m regtorch`."""

import sys

from regshared.versions import main

if __name__ == "__main__":
    sys.exit(main("regtorch"))
