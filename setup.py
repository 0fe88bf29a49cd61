"""What pyproject.toml cannot say: a wheel takes the package `pwopt.passes` from the folder `passes`."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPasses(build_py):
    """Copies `passes/` to `pwopt/passes/`.

    An entry in `package-dir` would do the same, but it would also turn an editable install from a path in a `.pth`
    file into an import hook, which type checkers cannot follow and which a folder named `pwopt` hides.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.package_dir["pwopt.passes"] = "passes"


setup(cmdclass={"build_py": BuildPasses})
