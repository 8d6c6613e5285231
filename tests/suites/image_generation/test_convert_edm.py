"""Teachers of the paper settings from EDM's pickles, of which nothing may run, and from diffusers' folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.problems.image_generation.edm import euler_step
from distillbench.suites.image_generation import convert_edm
from distillbench.suites.image_generation.diffusers_nets import DiffusersDenoiser, from_diffusers
from distillbench.suites.image_generation.edm_nets import EDMDenoiser
from distillbench.training.student import Student
from tests.suites.image_generation.fixtures import edm_pickle, tiny_edm, write_diffusers

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def fails(*parts: str) -> Iterator[None]:
    """The block raises a UserError of one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


# --- EDM's pickles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_round_trip(tmp_path: Path, network: str, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    net = tiny_edm(network)
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(edm_pickle(net, protocol=protocol, source=f"open({str(tmp_path / 'ran')!r}, 'w')"))
    assert convert_edm.main([str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{hashlib.sha256(target.read_bytes()).hexdigest()}  {target}\n"
    assert not (tmp_path / "ran").exists()  # the embedded source
    student = Student.from_bytes(target.read_bytes())
    assert (student.architecture.name, student.averaged, student.recipe) == ("edm-unet", "average", {})
    again = EDMDenoiser(**student.architecture.arguments).eval()
    again.load_state_dict(student.weights)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 9.0]), torch.tensor([1, 0])
    assert torch.equal(again(x, sigma, labels), net(x, sigma, labels))
    assert convert_edm.convert(source, tmp_path / "twice.safetensors") == hashlib.sha256(target.read_bytes()).hexdigest()


def test_the_arguments_of_the_published_checkpoints() -> None:
    """Their constructor arguments (train.py of NVlabs/edm) give networks of the published names and shapes."""
    golden = json.loads((ROOT / "tests/goldens/edm_nets.json").read_text())["full"]
    song = {"model_type": "SongUNet", "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
    song |= {"channel_mult_noise": 1, "resample_filter": [1, 1], "model_channels": 128, "channel_mult": [2, 2, 2], "augment_dim": 9}
    ve = {**song, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
    adm = {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]}
    cases = {
        "cifar10-cond-vp": {**song, "img_resolution": 32, "label_dim": 10},
        "cifar10-uncond-vp": {**song, "img_resolution": 32, "label_dim": 0},
        "cifar10-cond-ve": {**ve, "img_resolution": 32, "label_dim": 10},
        "imagenet64-cond-adm": {**adm, "img_resolution": 64, "label_dim": 1000},
    }
    for name, given in cases.items():
        node = convert_edm._Kept()
        node.name, node.state = "EDMPrecond", {"_init_kwargs": {**given, "img_channels": 3, "use_fp16": True, "dropout": 0.13}}
        with torch.device("meta"):
            net = EDMDenoiser(**convert_edm._arguments(node))
        lines = sorted(f"{k} {tuple(v.shape)}\n" for k, v in net.state_dict().items())
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == golden[name]["state_dict_sha256"]


def bombs(burst: Path) -> dict[str, bytes]:
    """Pickles that would write ``burst``."""
    command = f"touch {burst}"
    inner = io.BytesIO()
    torch.save(Call(os.system, command), inner, _use_new_zipfile_serialization=False)
    plain = pickle.dumps(Call(os.system, command))
    return {
        "at the top": plain,
        "below ema": pickle.dumps({"ema": Call(os.system, command)}),
        "eval": pickle.dumps({"ema": Call(eval, f"open({str(burst)!r}, 'w')")}),
        "inner storage": pickle.dumps({"ema": Call(torch.storage._load_from_bytes, inner.getvalue())}),
        "inner plain": pickle.dumps({"ema": Call(torch.storage._load_from_bytes, plain)}),
        "state": edm_pickle(tiny_edm("song"), extra=Call(os.system, command)),
    }


@pytest.mark.parametrize("kind", ["at the top", "below ema", "eval", "inner storage", "inner plain", "state"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    blob = bombs(tmp_path / "burst")[kind]
    source.write_bytes(blob)
    target.write_bytes(b"old")
    names = {"eval": "builtins.eval", "inner storage": "", "inner plain": ""}
    with fails("in.pkl", "refused", names.get(kind, "posix.system")):
        convert_edm.convert(source, target)
    assert not (tmp_path / "burst").exists()
    assert target.read_bytes() == b"old"
    if kind == "at the top":
        pickle.loads(blob)
        assert (tmp_path / "burst").exists()  # the bomb works


def test_no_name_that_runs_something_is_known() -> None:
    """Each name a pickle may use leads to this file's own functions or to plain containers, not to what has that name."""
    for name, known in convert_edm._reader().items():
        assert known.__module__ == convert_edm.__name__ or name in ("collections.OrderedDict", "builtins.set", "__builtin__.set"), name


def test_foreign_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    with fails("in.pkl", "cannot be read"):
        convert_edm.convert(source, target)
    with fails("must end in .safetensors"):
        convert_edm.convert(source, source)
    good = edm_pickle(tiny_edm("song"))
    cases = {
        "damaged": good[: len(good) // 2],
        "no network": pickle.dumps({"ema": [1, 2]}),
        "refers to torch.nn.modules.linear.Linear": pickle.dumps(nn.Linear(2, 2)),
        "VPPrecond": edm_pickle(tiny_edm("song"), kind="VPPrecond"),
        "'img_width'": edm_pickle(tiny_edm("song"), changes={"img_width": 3}),
        "neither SongUNet": edm_pickle(tiny_edm("song"), changes={"model_type": "UNet"}),
        "of another shape": edm_pickle(tiny_edm("song"), changes={"channel_mult_emb": 4}),
        "1 missing (model.map_augment.weight)": edm_pickle(tiny_edm("song", augment_dim=0), changes={"augment_dim": 9}),
        "1 unknown (model.map_augment.weight)": edm_pickle(tiny_edm("song"), changes={"augment_dim": 0}),
        "make no network": edm_pickle(tiny_edm("song"), changes={"channel_mult": []}),
        "decoder": edm_pickle(tiny_edm("song"), changes={"decoder_type": "skip"}),
    }
    for words, blob in cases.items():
        source.write_bytes(blob)
        with fails("in.pkl", "refused", words):
            convert_edm.convert(source, target)
    net = tiny_edm("song")
    with torch.no_grad():
        net.model.map_layer0.bias[0] = torch.nan
    source.write_bytes(edm_pickle(net))
    with fails("1 not finite (model.map_layer0.bias)"):
        convert_edm.convert(source, target)
    assert convert_edm.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not target.exists()


def test_views_that_claim_more_than_there_is(tmp_path: Path) -> None:
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    beyond = Call(torch._utils._rebuild_tensor_v2, torch.zeros(3)._typed_storage(), 0, (9,), (1,), False, {})
    source.write_bytes(pickle.dumps({"ema": beyond}))
    with fails("damaged", "sizes [9]"):
        convert_edm.convert(source, target)
    net = tiny_edm("song")
    net.model.map_layer0.weight = nn.Parameter(torch.zeros(1).expand(10**8, 10**6))  # one number, repeated 10^14 times
    source.write_bytes(edm_pickle(net))
    with fails("1 of another shape (model.map_layer0.weight)"):
        convert_edm.convert(source, target)


def test_runs_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.pkl", tmp_path / "out.safetensors"
    source.write_bytes(edm_pickle(tiny_edm("dhariwal")))
    monkeypatch.setattr(sys, "argv", ["convert_edm", str(source), str(target)])
    monkeypatch.delitem(sys.modules, convert_edm.__name__)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(convert_edm.__name__, run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out.split()[0] == hashlib.sha256(target.read_bytes()).hexdigest()


# --- diffusers' folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "schedule"), [("epsilon", "linear"), ("v_prediction", "squaredcos_cap_v2"), ("sample", "scaled_linear")]
)
@torch.no_grad()
def test_a_ddim_step_of_diffusers_is_an_euler_step(tmp_path: Path, prediction: str, schedule: str) -> None:
    """DDIM is Euler's rule in variance-exploding coordinates; its x_0 and its next sample are ours at the trained levels."""
    diffusers = pytest.importorskip("diffusers")
    write_diffusers(tmp_path, prediction_type=prediction, beta_schedule=schedule, clip_sample=False)
    student = from_diffusers(tmp_path)
    net = DiffusersDenoiser(**student.architecture.arguments).eval().double()
    net.load_state_dict(student.weights)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler", set_alpha_to_one=False, timestep_spacing="leading")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").double()
    theirs.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0])
    for t in (900, 100):
        alpha, after = (theirs.alphas_cumprod[i].double() for i in (t, t - 100))
        step = theirs.step(unet(x, t, labels).sample, t, x, eta=0.0)
        sigma, lower = (((1 - a) / a).sqrt().expand(2) for a in (alpha, after))
        noisy = x / alpha.sqrt()
        torch.testing.assert_close(net.timestep(sigma), torch.full((2,), float(t), dtype=torch.float64))
        torch.testing.assert_close(net(noisy, sigma, labels), step.pred_original_sample, rtol=1e-5, atol=1e-5)
        moved = euler_step(lambda a, s: net(a, s, labels), noisy, sigma, lower)
        torch.testing.assert_close(moved * after.sqrt(), step.prev_sample, rtol=1e-5, atol=1e-5)


def test_timesteps_between_and_beyond_the_trained_levels() -> None:
    pytest.importorskip("diffusers")
    arguments = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    arguments |= {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"), "add_attention": False}
    net = DiffusersDenoiser(arguments, {"num_train_timesteps": 100, "beta_schedule": "linear"})
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
    sigmas = np.sqrt((1 - alphas) / alphas)
    asked = torch.tensor([1e-4, sigmas[0], np.sqrt(sigmas[40] * sigmas[41]), sigmas[99], 1e4], dtype=torch.float64)
    np.testing.assert_allclose(net.timestep(asked).numpy(), [0, 0, 40.5, 99, 99], atol=1e-3)
    x = torch.randn(2, 3, 8, 8)
    assert net(x, torch.tensor([0.1, 50.0])).shape == x.shape
    assert net(x, torch.tensor([0.1, 50.0]), torch.tensor([0, 0])).shape == x.shape  # labels of an unconditional network


def test_a_folder_becomes_a_teacher_file(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    write_diffusers(tmp_path / "ddpm")
    convert_edm.convert(tmp_path / "ddpm", tmp_path / "out.safetensors")
    student = Student.from_bytes((tmp_path / "out.safetensors").read_bytes())
    net = DiffusersDenoiser(**student.architecture.arguments)
    net.load_state_dict(student.weights)
    with fails("labels are needed"):
        net(torch.randn(1, 3, 8, 8), torch.ones(1))
    seen: list[Any] = []
    net.get_submodule(net.stage_names[0]).register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    net(torch.randn(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    assert seen[0][0] == 1 and len(seen[0]) == 4


def test_folders_that_are_none(tmp_path: Path) -> None:
    with fails("config.json", "not a readable JSON"):
        from_diffusers(tmp_path)
    pytest.importorskip("diffusers")
    write_diffusers(tmp_path)
    config, weights = tmp_path / "unet/config.json", tmp_path / "unet/diffusion_pytorch_model.safetensors"
    content, blob = json.loads(config.read_text()), weights.read_bytes()
    config.write_text(json.dumps({**content, "_class_name": "UNet2DConditionModel"}))
    with fails("UNet2DConditionModel"):
        from_diffusers(tmp_path)
    config.write_text(json.dumps({**content, "block_out_channels": [16, 8]}))
    with fails("do not fit"):
        from_diffusers(tmp_path)
    config.write_text(json.dumps({**content, "time_embedding_type": "fourier"}))
    with fails("Fourier"):
        from_diffusers(tmp_path)
    config.write_text(json.dumps(content))
    weights.write_bytes(pickle.dumps({}))
    with fails("not a safetensors file"):
        from_diffusers(tmp_path)
    weights.write_bytes(blob)
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "flow"}))
    with fails("'flow'"):
        from_diffusers(tmp_path)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with fails("diffusers", "distillbench[images]"):
        DiffusersDenoiser({}, {})
