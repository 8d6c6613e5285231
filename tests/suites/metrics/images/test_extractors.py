"""Genuine weights are the user's to bring, so these networks have random weights in the genuine files' formats."""

import hashlib
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillbench.errors import UserError
from distillbench.suites.metrics.images import extractors
from distillbench.suites.metrics.images.extractors import Extractor, fidelity_inception, frechet_name, nvidia_inception, quantise


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(count=2, size=20, channels=3, seed=0):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Stand(nn.Module):
    """What of NVIDIA's file is used: ``layers`` after scaling, and a call that resizes by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 9, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 2048))
        self.output = nn.Linear(2048, 10)

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        x = F.interpolate(img.float(), size=[299, 299], mode="bilinear", align_corners=False)
        x = self.layers((x - 128) / 128)
        if return_features:
            return x
        if no_output_bias:
            return F.linear(x, self.output.weight).softmax(1)
        return self.output(x).softmax(1)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("nvidia") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(Stand().eval()), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of torch-fidelity's architecture."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **_):
            """Keep the random weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fidelity") / "pt_inception.pth"
    torch.save(Untrained("inception-v3-compat", ["2048"], nothing).state_dict(), path)
    return path


# uint8


@pytest.mark.parametrize(("rule", "offset"), [("round", 0.5), ("truncate", 0.0)])
def test_quantising_follows_the_protocol_for_every_level(rule, offset):
    x = torch.linspace(-1, 1, 10001)
    want = np.clip(np.floor((x.numpy().astype(np.float64) + 1) * 127.5 + offset), 0, 255)
    got = quantise(x, rule).numpy().astype(np.float64)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 2e-3  # only where float32 falls on the other side of a level


@pytest.mark.parametrize("rule", ["round", "truncate"])
def test_the_ends_of_the_range_and_beyond(rule):
    assert quantise(torch.tensor([-3.0, -1.0, 1.0, 3.0]), rule).tolist() == [0, 0, 255, 255]


def test_rounding_brings_every_level_back_and_uint8_passes():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(levels.float() / 127.5 - 1), levels)
    assert torch.equal(quantise((levels.float() / 127.5 - 1).to(torch.float64)), levels)
    assert quantise(levels, "truncate") is levels
    assert not torch.equal(
        quantise(levels.float() / 127.5 - 1 + 0.9 / 127.5), quantise(levels.float() / 127.5 - 1 + 0.9 / 127.5, "truncate")
    )


@pytest.mark.parametrize(
    ("x", "rule", "message"),
    [
        (torch.zeros(3), "floor", "unknown uint8 rule 'floor'"),
        (torch.zeros(3, dtype=torch.int64), "round", "give uint8, or floats in"),
        (torch.tensor([0.0, float("nan")]), "round", "not finite: the generator diverged"),
    ],
)
def test_images_that_cannot_be_quantised_are_refused(x, rule, message):
    with pytest.raises(UserError, match=message):
        quantise(x, rule)


# NVIDIA's TorchScript, through clean-fid's steps


def test_features_equal_clean_fids(script):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    x = images(3)
    model, resizer = InceptionV3W(str(script.parent), download=False), build_resizer("clean")
    resized = np.stack([resizer(i) for i in x.permute(0, 2, 3, 1).numpy()]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        want = model(torch.from_numpy(resized))
    extractor = nvidia_inception(script, sha256=digest(script))
    torch.testing.assert_close(extractor.features(x), want)
    torch.testing.assert_close(extractor.features(x.float() / 127.5 - 1, batch_size=2), want)  # floats are quantised first


def test_the_tensorflow_rule_is_the_files_own_resizing(script):
    x = images(2)
    base = torch.jit.load(str(script))
    with torch.no_grad():
        want, classes = base(x, return_features=True), base(x, no_output_bias=True)
    extractor = nvidia_inception(script, sha256=digest(script), resize="tensorflow")
    torch.testing.assert_close(extractor.features(x), want)
    torch.testing.assert_close(extractor.probabilities(x), classes)
    assert not torch.allclose(extractor.features(x), nvidia_inception(script, sha256=digest(script)).features(x), rtol=1e-3)


def test_torchscript_runs_only_under_its_pinned_hash(script, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded before its hash was checked")

    monkeypatch.setattr(torch.jit, "load", never)
    with pytest.raises(UserError, match=f"has sha256 {digest(script)[:16]}... where f58cb9b6ec323ed6... is expected"):
        nvidia_inception(script)


def test_another_torchscript_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="not the TorchScript Inception"):
        nvidia_inception(path, sha256=digest(path))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not the TorchScript Inception"):
        nvidia_inception(path, sha256=digest(path))


# The state dict of torch-fidelity


@pytest.fixture(scope="module")
def fidelity(weights):
    return fidelity_inception(weights, sha256=digest(weights))


def test_features_equal_torch_fidelitys(weights, fidelity):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    x = images(2, 24)
    want, logits = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))(x)
    features = fidelity.features(x)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, want)
    torch.testing.assert_close(fidelity.probabilities(x), logits.softmax(1))


def test_the_antialias_rule_equals_torchmetrics_and_differs(weights, fidelity):
    from torchmetrics.image.fid import NoTrainInceptionV3

    large = images(1, 400)  # the filters differ where images shrink
    with torch.no_grad():
        want = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))(large)
    antialias = fidelity_inception(weights, sha256=digest(weights), resize="antialias")
    torch.testing.assert_close(antialias.features(large), want)
    assert not torch.allclose(fidelity.features(large), want, rtol=1e-3)


def test_grey_images_are_equal_red_green_and_blue(script, fidelity):
    grey = images(1, channels=1)
    extractor = nvidia_inception(script, sha256=digest(script))
    torch.testing.assert_close(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))
    for made in (extractor, fidelity):
        with pytest.raises(UserError, match="1 or 3 channels, not 4"):
            made.features(images(1, channels=4))


def test_a_state_dict_under_another_hash_or_of_another_network_is_refused(weights, tmp_path):
    with pytest.raises(UserError, match=r"where 6726825d0af5f729\.\.\. is expected"):
        fidelity_inception(weights)
    for name, content in (("linear.pth", nn.Linear(2, 2).state_dict()), ("list.pth", [1, 2])):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not a state dict of torch-fidelity's Inception"):
            fidelity_inception(tmp_path / name, sha256=digest(tmp_path / name))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_with_code_is_not_run(tmp_path):
    path = tmp_path / "trap.pth"
    torch.save({"fc.weight": Trap()}, path, pickle_module=pickle)
    with pytest.raises(UserError, match="not a state dict"):
        fidelity_inception(path, sha256=digest(path))


# Identity and names


@pytest.mark.parametrize("make", [nvidia_inception, fidelity_inception])
def test_wrong_rules_and_missing_files_are_refused(make, tmp_path, script):
    with pytest.raises(UserError, match="unknown resize rule 'bicubic'"):
        make(script, resize="bicubic")
    with pytest.raises(UserError, match=r"cannot read Inception's weights at .*absent\.pt: No such file"):
        make(tmp_path / "absent.pt")


def test_an_unknown_uint8_rule_is_refused_before_images_come(script):
    with pytest.raises(UserError, match="unknown uint8 rule 'floor'"):
        nvidia_inception(script, sha256=digest(script), uint8="floor")


def test_the_identity_says_what_decides_the_value(script):
    made = nvidia_inception(script, sha256=digest(script).upper(), resize="tensorflow", uint8="truncate")
    assert made.identity == {
        "extractor": "inception_nvidia",
        "weights_sha256": digest(script),
        "resize": "tensorflow",
        "uint8": "truncate",
    }


def test_only_nvidias_published_weights_make_it_an_fid(script):
    made = nvidia_inception(script, sha256=digest(script))
    assert frechet_name(made.identity) == "fd_inception_nvidia"
    for name, sha256 in extractors.PUBLISHED.items():
        assert re.fullmatch("[0-9a-f]{64}", sha256)
        named = frechet_name({"extractor": name, "weights_sha256": sha256, "resize": "clean", "uint8": "round"})
        assert named == ("fid" if name == "inception_nvidia" else "fd_inception_fidelity")
    # a hash counts only for the network that it belongs to
    assert frechet_name({"extractor": "mine", "weights_sha256": extractors.NVIDIA_SHA256}) == "fd_mine"
    assert extractors.FIDELITY_SHA256.startswith("6726825d")  # as its file name says


def test_any_network_can_be_an_extractor_of_its_own_name():
    mine = Extractor("pixels", "0" * 64, "none", lambda x: x.flatten(1).float())
    x = images(5, 4, 1)
    assert torch.equal(mine.features(x, batch_size=2), x.flatten(1).float())
    assert frechet_name(mine.identity) == "fd_pixels"
    with pytest.raises(UserError, match="pixels has no classes"):
        mine.probabilities(x)
    for wrong in (x[0], x[:0]):
        with pytest.raises(UserError, match=r"\(N, C, H, W\), is needed"):
            mine.features(wrong)
