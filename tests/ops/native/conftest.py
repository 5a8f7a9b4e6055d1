"""The compiled kernels, once for each instruction set that this machine has."""

import shutil

import pytest

from moekit.ops import native
from moekit.ops.native.build import BuildError, cached_library


@pytest.fixture(scope="session", params=native.ISAS)
def kernels(request, tmp_path_factory):
    """The library with the kernels of one instruction set."""
    try:
        built = cached_library()
    except BuildError as error:
        pytest.skip(str(error))
    # The choice is made when a library is loaded, and a file of another name is another library.
    copy = tmp_path_factory.mktemp(request.param) / "native.so"
    shutil.copy(built, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEKIT_ISA", request.param)
        library = native.Library(str(copy))
    if not library.supports(request.param):
        pytest.skip(f"this machine has no {request.param}")
    assert library.isa == request.param
    return library


@pytest.fixture(scope="session")
def pool(kernels):
    """Two threads."""
    pool = native.Pool(kernels, 2)
    yield pool
    pool.close()
