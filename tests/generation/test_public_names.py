"""The public Python names of megalith: those that `dir` lists, and that the package has type hints."""

import pathlib

import megalith


def test_names_are_listed_and_found():
    assert set(megalith.__all__) >= {"GenerationParams", "complete", "generate", "generate_tokens", "load", "stream"}
    assert set(megalith.__all__) <= set(dir(megalith))
    for name in megalith.__all__:
        assert getattr(megalith, name).__name__ == name
    assert (pathlib.Path(megalith.__file__).parent / "py.typed").exists()
