"""Images from WebDataset shards and `datasets`, in every form that these libraries hand them over: the same images."""

import io

import pytest
import torch
from PIL import Image

from testreg.images.streaming import stream

COUNT = 12


def to_tensor(picture):
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    random = torch.Generator().manual_seed(0)
    for index in range(COUNT):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).save(path / f"{index:02}.png")
    return path


def digests(images, **more):
    return [digest for batch in stream(images, to_tensor, batch_size=4, **more) for digest in batch.digests]


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    import webdataset

    target = tmp_path_factory.mktemp("shards")
    photos = sorted(folder.iterdir())
    for shard in range(2):
        with webdataset.TarWriter(str(target / f"{shard}.tar")) as writer:
            for photo in photos[shard::2]:
                writer.write({"__key__": photo.stem, "png": photo.read_bytes(), "cls": 3, "json": {"author": "none"}})
    return lambda: webdataset.WebDataset([str(target / f"{shard}.tar") for shard in range(2)], shardshuffle=False)


WEBDATASET = {
    "encoded": lambda shards: shards,
    "pictures": lambda shards: shards.decode("pil"),
    "tuples": lambda shards: shards.decode("pil").to_tuple("png", "cls"),
    "arrays": lambda shards: shards.decode("rgb8").to_tuple("png"),
}


@pytest.mark.parametrize("form", WEBDATASET)
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(folder, shards, form, workers):
    images = WEBDATASET[form](shards())
    seen = digests(images, workers=workers)
    assert len(seen) == COUNT
    assert set(seen) == set(digests(folder))
    assert digests(images) == seen  # and once more


DATASETS = {
    "rows": lambda rows, datasets: rows,
    "streamed": lambda rows, datasets: rows.to_iterable_dataset(),
    "encoded": lambda rows, datasets: rows.cast_column("image", datasets.Image(decode=False)),
    "a column": lambda rows, datasets: rows["image"],
    "tensors": lambda rows, datasets: rows.with_format("torch"),
    "arrays": lambda rows, datasets: rows.with_format("numpy"),
}


@pytest.mark.parametrize("form", DATASETS)
def test_datasets(folder, form):
    import datasets

    photos = [str(path) for path in sorted(folder.iterdir())]
    rows = datasets.Dataset.from_dict({"image": photos, "label": [1] * COUNT})
    images = DATASETS[form](rows.cast_column("image", datasets.Image()), datasets)
    assert digests(images) == digests(folder)


@pytest.mark.parametrize("form", ["webdataset", "datasets"])
def test_the_rows_of_both_without_the_libraries(folder, form):
    """What one row is, in the libraries' own raw forms; drawn one by one, never all held."""

    def rows():
        for path in sorted(folder.iterdir()):
            if form == "webdataset":
                yield {"__key__": path.stem, "__url__": "0.tar", "png": path.read_bytes(), "cls": b"3"}
            else:
                yield {"image": {"bytes": path.read_bytes(), "path": None}, "label": 1}

    assert digests(rows()) == digests(folder)
    picture = Image.open(io.BytesIO(next(iter(sorted(folder.iterdir()))).read_bytes()))
    assert digests([picture])[0] == digests(folder)[0]
