"""Where the files of a split may lie: in a folder of its name, or as the hub writes data sets."""

from pathlib import Path

import pytest
from published_folders import umu_folder

from fastvkd.cli import main
from fastvkd.data import tables
from fastvkd.data.check import check_data
from fastvkd.data.sources import evaluation_cells, read_forget_retain, recognise
from fastvkd.errors import DataError

pytestmark = pytest.mark.fault("damaged data")


def photos(folder: Path) -> list[list[str]]:
    return [[photo.key for one in side for photo in one.photos] for side in read_forget_retain(str(folder), *SPLITS)]


SPLITS = ("forget_5", "retain_95")


@pytest.fixture
def usual(tmp_path: Path) -> Path:
    return umu_folder(tmp_path / "usual")


def in_one_folder(usual: Path, to: Path) -> Path:
    """All splits side by side in `data/`, told apart by the names of their shards."""
    (to / "data").mkdir(parents=True)
    for file in usual.glob("*/*.parquet"):
        (to / "data" / file.name.replace("train-", f"{file.parent.name}-")).write_bytes(file.read_bytes())
    return to


def each_in_data(usual: Path, to: Path) -> Path:
    for file in usual.glob("*/*.parquet"):
        (to / file.parent.name / "data").mkdir(parents=True)
        (to / file.parent.name / "data" / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("lay", [in_one_folder, each_in_data])
def test_the_hubs_layouts_are_read_as_the_usual_one(usual: Path, tmp_path: Path, lay) -> None:
    other = lay(usual, tmp_path / "other")
    assert recognise(other).splits(other) == recognise(usual).splits(usual)
    assert photos(other) == photos(usual)
    assert evaluation_cells(str(other), *SPLITS).keys() == evaluation_cells(str(usual), *SPLITS).keys()
    assert check_data(other).ok and check_data(other).splits == check_data(usual).splits


def test_a_missing_shard_of_one_split_beside_others_is_named(usual: Path, tmp_path: Path, capsys) -> None:
    other = in_one_folder(usual, tmp_path / "other")
    whole = other / "data" / "forget_5-00000-of-00001.parquet"
    whole.rename(whole.with_name("forget_5-00000-of-00002.parquet"))
    with pytest.raises(DataError, match=r"data: 1 of 2 shards missing: forget_5-00001-of-00002.parquet"):
        photos(other)
    assert main(["data", "check", str(other)]) == 2
    assert "forget_5-00001-of-00002.parquet" in capsys.readouterr().out


def test_one_split_in_two_places_is_refused(usual: Path, tmp_path: Path) -> None:
    other = in_one_folder(usual, tmp_path / "other")
    (usual / "forget_5").rename(other / "forget_5")
    with pytest.raises(DataError, match=r"split forget_5 is in both .*/forget_5/train-.* and .*data/forget_5-"):
        photos(other)


def test_other_splits_are_read_beside_one_in_two_places(usual: Path, tmp_path: Path) -> None:
    other = in_one_folder(usual, tmp_path / "other")
    (other / "forget_5").mkdir()  # of photos, say
    assert photos(other) == photos(usual)
    (usual / "forget_5").rename(other / "twice")
    (other / "forget_5").rmdir()
    (other / "twice").rename(other / "forget_5")
    assert tables.split_files(other, "retain_95") and tables.splits(other) == sorted({*SPLITS, *tables.splits(usual)})


def test_a_split_may_be_told_as_a_path(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    usual.rename(tmp_path / "config" / "usual")
    assert tables.split_files(tmp_path / "config", "usual/forget_5")
    assert tables.split_files(tmp_path / "config" / "usual", "forget_5/")
    assert tables.split_files(tmp_path / "config" / "usual" / "forget_5", ".")


def test_the_one_split_of_a_data_set_is_called_as_its_folder(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "data").mkdir(parents=True)
    for number, split in enumerate(SPLITS):
        content = (usual / split / "train-00000-of-00001.parquet").read_bytes()
        (tmp_path / "one" / "data" / f"train-0000{number}-of-00002.parquet").write_bytes(content)
    assert tables.splits(tmp_path / "one") == ["data"]
    assert len(tables.split_files(tmp_path / "one", "data")) == 2
    assert tables.split_files(tmp_path / "one", "train") == tables.split_files(tmp_path / "one", "data")
