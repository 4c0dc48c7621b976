from __future__ import annotations

import io
import logging

import pytest
import torch

from dream_callbacks.logging.frames import images_of, png_of_figure, videos_of
from dream_callbacks.logging.png import Frame, animated_png

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(
    ("shape", "num_frames", "size"),
    [
        ((2, 3, 6, 5), 2, (5, 6, 3)),
        ((2, 6, 5, 3), 2, (5, 6, 3)),
        ((1, 6, 5), 1, (5, 6, 1)),
        ((6, 5, 3), 1, (5, 6, 3)),
        ((7, 8, 9), 7, (9, 8, 1)),
        ((4, 5), 1, (5, 4, 1)),
    ],
    ids=str,
)
def test_images_are_understood_in_the_usual_layouts(shape, num_frames, size):
    frames = images_of(torch.rand(shape))

    assert [(frame.width, frame.height, frame.channels) for frame in frames] == [size] * num_frames


def test_pixels_keep_their_places_and_values():
    image = torch.zeros(3, 2, 2)
    image[:, 0, 1] = torch.tensor([1.0, 0.5, 0.0])
    (frame,) = images_of(image)

    with Image.open(io.BytesIO(frame.png)) as picture:
        assert picture.mode == "RGB"
        assert picture.getpixel((1, 0)) == (255, 128, 0)
        assert picture.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([[2.0, -1.0, float("nan"), float("inf")]]), bytes([255, 0, 0, 255])),
        (torch.tensor([[0, 128, 255, 300]]), bytes([0, 128, 255, 255])),
        (torch.tensor([[True, False]]), bytes([255, 0])),
        (torch.tensor([[0.5]], dtype=torch.bfloat16), bytes([128])),
    ],
    ids=["float", "int", "bool", "bfloat16"],
)
def test_values_become_bytes(values, expected):
    (frame,) = images_of(values)

    assert frame.pixels == expected


def test_a_picture_taken_is_not_changed_by_what_happens_to_the_tensor():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    (frame,) = images_of(image)
    image.fill_(255)

    assert frame.pixels == bytes(4)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pil_images_are_taken(mode):
    (frame,) = images_of(Image.new(mode, (3, 2)))

    assert (frame.width, frame.height) == (3, 2)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 7, 8, 9), torch.zeros(3), "text", torch.zeros(1, 1, 0, 4)], ids=str
)
def test_what_is_no_image_is_left_out_with_a_word(bad, caplog):
    with caplog.at_level(logging.WARNING):
        assert images_of(bad) == []

    assert "images are left out" in caplog.text


def test_an_animated_png_plays_in_order():
    (frames,) = videos_of(torch.linspace(0, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 2, 2))

    with Image.open(io.BytesIO(animated_png(frames, fps=10))) as video:
        shades = []
        for index in range(video.n_frames):
            video.seek(index)
            shades.append(video.convert("L").getpixel((0, 0)))
        assert (shades, video.info["duration"]) == ([0, 128, 255], 100.0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_each_number_of_channels_has_its_kind_of_png(channels, mode):
    with Image.open(io.BytesIO(Frame(2, 2, channels, bytes(4 * channels)).png)) as picture:
        assert picture.mode == mode


def test_a_figure_is_drawn_by_its_own_savefig(caplog):
    class Figure:
        def savefig(self, file, **options):
            file.write(Frame(1, 1, 1, b"\0").png)

    class Broken:
        def savefig(self, file, **options):
            raise RuntimeError("no backend")

    assert png_of_figure(Figure()).startswith(b"\x89PNG")
    assert png_of_figure(Broken()) == b""
    assert png_of_figure(object()) == b""
    assert "no backend" in caplog.text
