import pytest

from nectar_mlx.library import Library


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "library")


@pytest.fixture
def notes(tmp_path):
    """A folder of two long documents and five short ones."""
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    for number, animal in enumerate(("heron", "badger")):
        text = f"The {animal} lives by the river. " * 300
        (folder / f"long {number}.txt").write_text(text + f"\n\nThe {animal} weighs {number + 3} kilograms.")
    for number, metal in enumerate(("copper", "silver", "cobalt", "nickel", "zinc")):
        (folder / "deep" / f"note {number}.md").write_text(
            f"# Shopping\n\nThe {metal} pipe costs {number + 10} crowns."
        )
    return folder
