"""`python -m kit.report RUN` writes the report of a run folder anew."""

from kit.report.before_after import main

if __name__ == "__main__":
    main()
