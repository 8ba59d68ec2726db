"""Check one chapter as `make test` would: its page, the house rules about it, its module's tests.

    python site/check.py nbs/07_optim.ipynb
"""
import os
import subprocess
import sys
import time
from pathlib import Path

from notebooks import ROOT


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    page = Path(sys.argv[1]).resolve()
    module = page.stem.partition("_")[2] or page.stem
    pytest = [sys.executable, "-m", "pytest"]
    house = f"{page.stem} or [{module}] or not ["  # rules about this page, and those about the whole
    steps = {"the page": [sys.executable, ROOT / "site" / "execute.py", page],
             "the house": [*pytest, "tests/test_house.py", "-k", house]}
    if (ROOT / "tests" / f"test_{module}.py").exists():
        steps["its tests"] = [*pytest, f"tests/test_{module}.py", "-n", "2", "-m", "not slow"]
    # Two workers with as many threads each as there are cores would wait for each other all the time.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    started = time.perf_counter()
    for name, command in steps.items():
        print(f"== {page.stem}: {name}", flush=True)
        more = threads if "-n" in command else {}
        if subprocess.run(command, cwd=ROOT, env={**more, **os.environ}).returncode:
            print(f"== {page.stem}: {name} failed", flush=True)
            return 1
    print(f"== {page.stem}: passed in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
