"""``python -m craft_opt.bridge.report``: the same as ``craft-report``."""

from craft_opt.bridge.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
