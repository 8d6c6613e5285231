"""The top-level folders under their one import name, distillbench; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {
    "distillbench": "bench",
    "distillbench.methods": "methods",
    "distillbench.suites": "suites",
    "distillbench.leaderboard": "leaderboard",
}

setup(
    package_dir=ROOTS,
    packages=[name for root, folder in ROOTS.items() for name in (root, *(f"{root}.{p}" for p in find_packages(folder)))],
)
