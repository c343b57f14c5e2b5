"""Print the versions that a bug report needs: `python -m regjax`."""

from regshared.versions import main

if __name__ == "__main__":
    main("regjax")
