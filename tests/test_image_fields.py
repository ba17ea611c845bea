"""Every picture that a row names is read, or the row is refused."""

import pytest
from lightvlm.data.image_fields import image_names


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"image": "a.png"}, ["a.png"]),
        ({"images": ["a.png", "b c.jpg"]}, ["a.png", "b c.jpg"]),
        ({"images": "https://a.b/c.png?size=2"}, ["https://a.b/c.png?size=2"]),
        ({"image": None, "images": ["a.png"]}, ["a.png"]),
        ({"image": "a.png", "images": ["a.png"]}, ["a.png"]),
        ({"text": "who are you?"}, []),
        ({"image": "a.png", "meta": {"url": "http://a.b/page", "size": [3, 4]}, "tags": ["x", {"n": 1}]}, ["a.png"]),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a.png"]}, ["a.png"]),
        ({"images": [], "prompt": "what does photo.png in a README mean? see a.png"}, []),
        ({"image": None, "img": None, "profile": "x", "category": "files", "pathology": "no"}, []),
        ({"image": "val/1.jpg", "image_id": 1, "file_name": "1.jpg", "coco_url": "http://a.b/1.jpg"}, ["val/1.jpg"]),
        ({"image": "val/1.jpg", "url": "http://a.b/original.jpg"}, ["val/1.jpg"]),  # where it comes from
    ],
)
def test_pictures_that_are_read(row, names):
    assert image_names(row) == names


@pytest.mark.parametrize("value", ["", " ", [""], [None], ["a.png", ""], {"path": "a.png"}, 7, float("nan"), False])
@pytest.mark.parametrize("field", ["image", "images"])
def test_what_is_no_path_is_refused(field, value):
    with pytest.raises(ValueError, match="is no path: give one, or leave the key out"):
        image_names({field: value})


@pytest.mark.parametrize(
    "key",
    # fmt: off
    [
        "image_path",
        "img",
        "imgs",
        "file",
        "file_name",
        "fileName",
        "filename",
        "picture",
        "Picture",
        "photo",
        "photos",
        "url",
        "image_url",
        "imageUrl",
        "image_file",
        "imagepath",
        "image_0",
        "image2",
        "pic",
        "path",
        "screenshot",
        "image_id",
        "video",
    ],
    # fmt: on
)
def test_a_key_that_looks_like_a_picture_is_refused_by_its_name(key):
    with pytest.raises(ValueError, match=f"'{key}' looks like a picture that is not read: call it image or images"):
        image_names({"question": "what?", key: "x"})


@pytest.mark.parametrize(
    "row",
    [
        {"source": "a.png"},
        {"media": ["b.JPG"]},
        {"data": "data:image/png;base64,aGVsbG8="},
        {"image": "a.png", "image2": "b.png"},
        {"image": "a.png", "depth_image": "d/a_depth.png"},
        {"input": {"image": "0.png"}},
        {"media": [{"type": "image", "url": "a"}]},
        {"content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
        {"data": {"base64": "aGVsbG8="}},
    ],
)
def test_a_picture_under_any_other_name_is_refused(row):
    with pytest.raises(ValueError, match="looks like a picture that is not read"):
        image_names({"question": "what?", **row})


def test_two_fields_that_differ_are_refused():
    with pytest.raises(ValueError, match="image and images differ"):
        image_names({"image": "a.png", "images": ["b.png"]})
