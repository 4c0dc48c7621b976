from __future__ import annotations

import io
import logging

import pytest
import torch

from dream_callbacks.logging.frames import figure_png, image_frames, video_frames
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
def test_images_in_common_layouts_are_converted(shape, num_frames, size):
    frames = image_frames(torch.rand(shape))

    assert [(frame.width, frame.height, frame.channels) for frame in frames] == [size] * num_frames


def test_pixels_keep_their_positions_and_values():
    image = torch.zeros(3, 2, 2)
    image[:, 0, 1] = torch.tensor([1.0, 0.5, 0.0])
    (frame,) = image_frames(image)

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
    (frame,) = image_frames(values)

    assert frame.pixels == expected


def test_a_frame_does_not_change_with_its_tensor():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    (frame,) = image_frames(image)
    image.fill_(255)

    assert frame.pixels == bytes(4)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pil_images_are_converted(mode):
    (frame,) = image_frames(Image.new(mode, (3, 2)))

    assert (frame.width, frame.height) == (3, 2)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 7, 8, 9), torch.zeros(3), "text", torch.zeros(1, 1, 0, 4)], ids=str
)
def test_an_invalid_image_is_left_out_with_a_warning(bad, caplog):
    with caplog.at_level(logging.WARNING):
        assert image_frames(bad) == []

    assert "images are left out" in caplog.text


def test_an_animated_png_plays_in_order():
    (frames,) = video_frames(torch.linspace(0, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 2, 2))

    with Image.open(io.BytesIO(animated_png(frames, fps=10))) as video:
        shades = []
        for index in range(video.n_frames):
            video.seek(index)
            shades.append(video.convert("L").getpixel((0, 0)))
        assert (shades, video.info["duration"]) == ([0, 128, 255], 100.0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_each_number_of_channels_has_its_png_color_type(channels, mode):
    with Image.open(io.BytesIO(Frame(2, 2, channels, bytes(4 * channels)).png)) as picture:
        assert picture.mode == mode


def test_a_figure_is_rendered_by_its_savefig(caplog):
    class Figure:
        def savefig(self, file, **options):
            file.write(Frame(1, 1, 1, b"\0").png)

    class Broken:
        def savefig(self, file, **options):
            raise RuntimeError("no backend")

    assert figure_png(Figure()).startswith(b"\x89PNG")
    assert figure_png(Broken()) == b""
    assert figure_png(object()) == b""
    assert "no backend" in caplog.text
