"""The thumbnail and the tiles of a grid are counted, laid out and padded as LLaVA-NeXT's, and others refused."""

import math

import numpy
import pytest
import torch
from lightvlm.views_lightvlm import lay_out, one_view
from tiny import GRIDS, NEXT_GRIDS, make_config, make_image, make_model, make_processor, make_views, random_sizes
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("grids", [GRIDS, NEXT_GRIDS])
def test_processor_and_model_count_the_same_tokens(grids, newline):
    config = make_config(image_grid_pinpoints=grids, image_newline=newline)
    processor = make_processor(pinpoints=grids, image_newline=newline)
    sizes = random_sizes(300)
    lengths = [processor.count_tokens(size) for size in sizes]
    assert lay_out(sizes, config, CPU).lengths == lengths
    assert max(lengths) <= config.max_image_tokens == processor.max_image_tokens


def test_an_image_that_fits_one_tile_is_one_view():
    config = make_config(image_grid_pinpoints=GRIDS)
    assert [config.grids.count_views(size) for size in [(84, 84), (40, 60), (168, 168), (250, 250), (84, 250)]] == [
        1,
        1,
        5,
        10,
        4,
    ]


def test_a_layout_has_thumbnail_then_joined_tiles_and_each_place_in_the_whole_picture():
    config = make_config(image_grid_pinpoints=GRIDS, image_newline=True)
    layout = lay_out([(84, 168), (84, 84)], config, CPU)  # two tiles beside each other, and one
    assert layout.lengths == [36 + 6 * 13, 36 + 6 * 7]
    assert layout.source[0, :36].tolist() == [*range(36)]
    row = layout.source[0, 36:49].tolist()  # six patches of the left tile, six of the right, newline
    assert row == [*range(36, 42), *range(72, 78), 0]
    assert layout.is_patch[0, 36:49].tolist() == [True] * 12 + [False]
    assert layout.is_tile[0].tolist() == [False] * 36 + [True] * 12 + [False] + layout.is_tile[0, 49:].tolist()
    torch.testing.assert_close(layout.columns[0, 38:40], torch.tensor([0.75, 1.25]))  # two patches in one of six
    assert layout.rows[0, 36:48].unique().tolist() == [0]
    assert layout.source[1, :36].tolist() == [*range(108, 144)]  # the second image's view follows three of the first
    assert layout.is_patch[1, 36:].sum() == 36 and not layout.is_patch[1, 36 + 6 * 7 :].any()


class Operations(TorchDispatchMode):
    """Counts what runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_layout_of_one_view_is_made_once_and_serves_training_too():
    with torch.inference_mode():
        first = one_view(11, 1, CPU)
    with Operations() as operations:
        layout = one_view(11, 4, CPU)
    assert operations.count == 0 and layout.rows is first.rows
    assert (layout.lengths, layout.views) == ([121] * 4, [1] * 4)
    assert (layout.rows * 11 + layout.columns).tolist() == [*range(121)]
    embedding = torch.nn.Embedding(11, 2)
    embedding(layout.rows).sum().backward()
    assert embedding.weight.grad.tolist() == [[11, 11]] * 11


@pytest.mark.parametrize("size", [(84, 84), (250, 100)])
def test_what_the_encoder_left_stands_where_it_was(size):
    config = make_config(image_grid_pinpoints=GRIDS)
    whole = one_view(6, 1, CPU) if size == (84, 84) else lay_out([size], config, CPU)
    views = sum(whole.views)
    values = torch.arange(1.0, views * 36 + 1).view(views, 36)
    places = torch.rand(views, 36).argsort(dim=1)[:, :20].sort().values
    (everything,) = lay_out([size], config, CPU).gather(values)
    found, layout = whole.place(places, values.gather(1, places))
    is_left = torch.isin(everything, values.gather(1, places))
    assert torch.equal(found[0], everything * is_left) and torch.equal(layout.is_patch[0], is_left)
    assert layout.lengths == whole.lengths and layout.rows.shape == (1, whole.lengths[0])


def test_a_place_does_not_depend_on_the_other_images_of_a_batch():
    config = make_config(image_grid_pinpoints=GRIDS)
    sizes = [(50, 50), (84, 168), (250, 240)]
    together = lay_out(sizes, config, CPU)
    for index, size in enumerate(sizes):
        alone, length = lay_out([size], config, CPU), together.lengths[index]
        for name in ("is_patch", "is_tile", "rows", "columns"):
            assert torch.equal(getattr(together, name)[index, :length], getattr(alone, name)[0]), name


def test_views_need_the_sizes_of_their_images():
    model, processor = make_views()
    inputs = processor(images=make_image(0, (250, 250)), text="<image>?", return_tensors="pt")
    without = {name: value for name, value in inputs.items() if name != "image_sizes"}
    with pytest.raises(ValueError, match="with no image_sizes: give what one call of the processor returned"):
        model(**without)
    with pytest.raises(ValueError, match="with 2 image_sizes"):
        model(**without, image_sizes=torch.tensor([[250, 250], [84, 84]]))
    with pytest.raises(ValueError, match="sees one view of an image"):
        make_model()(**inputs)


def test_views_of_other_grids_are_refused():
    inputs = make_processor(pinpoints=[[168, 168]])(images=make_image(0, (250, 250)), return_tensors="pt")
    with pytest.raises(ValueError, match="has 5 views of an image that has 10 here"):
        make_model(image_grid_pinpoints=GRIDS).get_image_features(**inputs)


@pytest.mark.parametrize("grids", [[[84, 100]], [[0, 84]], [[42, 84]]])
def test_grids_are_multiples_of_a_view(grids):
    with pytest.raises(ValueError, match="give multiples of 84"):
        make_config(image_grid_pinpoints=grids)


@pytest.mark.parametrize("size", [(518, 336), (336, 518), (640, 480), (100, 101), (252, 84)])
@pytest.mark.parametrize("tensors", ["pt", "np"])
def test_the_padding_of_tiles_goes_on_with_the_edges_of_the_picture(size, tensors):
    """Black bars are answered as black; a LLaVA-NeXT checkpoint, which has newlines, learned with them."""
    image, ours = make_image(0, size), make_processor(pinpoints=GRIDS)
    grid = ours.grids.tiles(size[::-1])
    padded = make_processor(pinpoints=GRIDS, image_newline=True)(images=image, text="<image>", return_tensors=tensors)
    filled = ours(images=image, text="<image>", return_tensors=tensors)
    pictures = []
    for inputs in (filled, padded):
        tiles = torch.as_tensor(inputs["pixel_values"])[0, 1:].unflatten(0, grid)
        pictures.append(tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))
    scale = min(grid[0] * 84 / size[1], grid[1] * 84 / size[0])
    height, width = (min(math.ceil(round(side * scale, 6)), n * 84) for side, n in zip(size[::-1], grid, strict=True))
    top, left = (grid[0] * 84 - height) // 2, (grid[1] * 84 - width) // 2
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    assert torch.equal(pictures[0][inside], pictures[1][inside])
    expected = numpy.pad(
        pictures[1][inside].numpy(),
        ((0, 0), (top, grid[0] * 84 - height - top), (left, grid[1] * 84 - width - left)),
        mode="edge",
    )
    assert torch.equal(pictures[0], torch.from_numpy(expected))
