"""Print the versions that a bug report needs: `python -m regtorch`."""

from regshared.versions import main

if __name__ == "__main__":
    main("regtorch")
