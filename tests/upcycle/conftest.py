import pytest

from tests.upcycle.dense_models import is_ffn, write_dense, write_texts


@pytest.fixture(scope="session")
def family_of_models(tmp_path_factory):
    """Directories: a base, two fine-tunes of all of it, two of its FFNs alone, and texts."""
    root = tmp_path_factory.mktemp("dense")
    base = write_dense(root / "base")
    return {
        "base": base,
        "code": write_dense(root / "code", like=base, seed=1),
        "prose": write_dense(root / "prose", like=base, seed=2),
        "ffn-code": write_dense(root / "ffn-code", like=base, seed=3, moves=is_ffn),
        "ffn-prose": write_dense(root / "ffn-prose", like=base, seed=4, moves=is_ffn),
        "texts": write_texts(root / "texts"),
    }
