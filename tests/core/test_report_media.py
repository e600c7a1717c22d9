import json

import pytest
import torch
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from mmrl.errors import MMRLError
from mmrl.report.system import describe_system
from mmrl.report.video import FAILURE, SUCCESS, write_animation


def rgb(image: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    """A pixel."""
    red, green, blue = image.convert("RGB").crop((x, y, x + 1, y + 1)).tobytes()
    return red, green, blue


@pytest.mark.parametrize(("success", "colour"), [(True, SUCCESS), (False, FAILURE), (None, None)])
def test_animation_plays_the_frames_and_ends_with_the_outcome(tmp_path, success, colour):
    frames = torch.zeros(5, 64, 80, 3, dtype=torch.uint8)
    for t in range(5):
        frames[t, 20:40, 10 * t : 10 * t + 20] = 255
    write_animation(tmp_path / "a.webp", frames, 8, success)
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]
    with WebPImageFile(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (80, 64), 0)
        for t in range(5):
            image.seek(t)
            image.load()
            assert image.info["duration"] == (1200 if t == 4 else 125)
            assert rgb(image, 10 * t + 10, 30)[0] > 220 and rgb(image, 79 if t < 4 else 40, 50)[0] < 30
            corner = rgb(image, 0, 0)
            expected = colour if t == 4 and colour else (0, 0, 0)
            assert max(abs(a - b) for a, b in zip(corner, expected, strict=True)) < 40
    assert frames[4, 0, 0].tolist() == [0, 0, 0]  # the caller's frames stay as they were


def test_animation_refuses_what_is_no_video(tmp_path):
    with pytest.raises(ValueError, match="uint8 frames"):
        write_animation(tmp_path / "a.webp", torch.zeros(2, 3, 8, 8), 8)
    with pytest.raises(MMRLError, match=r"cannot write .*a\.webp"):
        write_animation(tmp_path / "missing" / "a.webp", torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 8)


def test_system_description_is_plain_and_true():
    system = describe_system()
    assert json.loads(json.dumps(system)) == system
    assert system["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(system["versions"]["torch"])
    assert system["hardware"]["cores"] >= 1 and len(system["hardware"]["gpus"]) == torch.cuda.device_count()
