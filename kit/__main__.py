"""`python -m kit`: the same as the command `valley`."""

from kit.command_line import main

if __name__ == "__main__":
    main()
