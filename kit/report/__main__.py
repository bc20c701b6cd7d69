"""Write the report of a run folder again: `python -m kit.report RUN`."""

from kit.report.before_after import main

if __name__ == "__main__":
    main()
