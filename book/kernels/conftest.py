"""Where there is no triton (macOS, Windows), the chapters about kernels are left out of the tests, and that is said."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:

    def pytest_pycollect_makemodule():
        pytest.skip("there is no triton for this system")

    def pytest_collect_file(file_path):
        if file_path.suffix == ".ipynb":
            pytest.skip(
                "there is no triton for this system", allow_module_level=True
            )
