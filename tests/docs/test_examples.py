"""The examples run, at sizes that take seconds, and say what they are meant to say."""

import argparse
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from tests import scripts
from tests.helpers import HANG

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["--depth", "1", "--channels", "4", "--size", "16", "--batch", "8"]


def run(script, *arguments):
    return scripts.run([script, *map(str, arguments)])


@pytest.fixture
def inside(monkeypatch, capsys):
    """Like `run`, in this process, for scripts that compile next to nothing: what they
    import costs more than what they do.
    """

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return call


def test_the_u_net_trains_and_draws(tmp_path):
    picture = tmp_path / "out.png"
    done = run(
        "examples/train_unet.py",
        *SMALL,
        "--steps",
        "60",
        "--rate",
        "2e-2",
        "--out",
        picture,
    )
    assert done.returncode == 0, done.stderr
    gained = re.search(
        r"held-out patches: \S+ dB noisy, \S+ dB denoised: ([+-]\S+) dB", done.stdout
    )
    assert gained
    assert float(gained[1]) > 1
    assert re.search(r"^device 0 F0", done.stdout, re.MULTILINE)
    assert "loss=" in done.stderr  # the progress bar
    # Three columns, and four patches of 2.3 inches with what stands around them.
    assert matplotlib.image.imread(picture).shape[:2] == (4 * 2.3 * 150, 3 * 2 * 150)
    timeline = matplotlib.image.imread(tmp_path / "out_timeline.png")
    assert timeline.shape[1] > timeline.shape[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "20"], "--size 20: a multiple of 2**depth = 32"),
        (["--stages", "99"], "--stages 99: the model has only 22 layers"),
        (["--chunks", "0"], "--chunks 0: at least 1"),
        (["--schedule", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_wrong_flags_get_one_line(inside, arguments, message):
    done = inside("examples/train_unet.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_help_explains_each_flag(inside):
    text = inside("examples/train_unet.py", "--help").stdout
    flags = set(re.findall(r"--\w+", text)) - {"--help"}
    assert {"--depth", "--blocks", "--channels", "--chunks", "--checkpoint"} < flags
    assert text.count("(default:") == len(flags)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_training_cleanly(tmp_path):
    picture = tmp_path / "out.png"
    command = [
        sys.executable,
        "examples/train_unet.py",
        *SMALL,
        "--steps",
        "100000",
        "--out",
        str(picture),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | scripts.ENVIRONMENT,
        text=True,
        stdout=pipe,
        stderr=pipe,
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "loss=" not in seen:
            letter = process.stderr.read(1)
            assert letter, seen
            seen += letter
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=HANG)
    assert process.returncode == 0, error
    assert "stopped after" in error + out
    assert "Traceback" not in error
    assert picture.exists()


def test_what_fits_is_found_to_the_byte():
    """A plan of the model that was found has the bytes that were found, and one more
    block is too many.
    """
    done = run("examples/what_fits.py", "--small", "--check")
    assert done.returncode == 0, done.stderr
    row = r"^\[(\d), (\d)\]: (fits|does not fit), peak (\d+) bytes; found (\d+)$"
    fits, more = re.findall(row, done.stdout, re.MULTILINE)
    assert (fits[2], more[2]) == ("fits", "does not fit")
    assert (int(more[0]), more[1]) == (int(fits[0]) + 1, fits[1])
    assert int(fits[3]) == int(fits[4]) <= 2**18 < int(more[3])
    # Two equal halves of four microbatches are faster than one device.
    (speed,) = re.findall(r"^ +2 +4 +(\d\.\d{3}) +- ", done.stdout, re.MULTILINE)
    assert 1 < float(speed) < 2


def test_the_language_model_prints_the_same_losses_with_both_executors(
    tmp_path,
):
    small = [
        "--blocks",
        2,
        "--width",
        16,
        "--heads",
        2,
        "--context",
        16,
        "--batch",
        8,
        "--steps",
        6,
        "--every",
        3,
    ]
    small += ["--sample", 12, "--checkpoints", tmp_path]

    def losses(*arguments):
        done = run("examples/train_lm.py", *small, *arguments)
        assert done.returncode == 0, done.stderr
        found = dict(
            re.findall(
                r"step (\d): loss (\d\.\d+, held-out loss \d\.\d+)",
                done.stdout + done.stderr,
            )
        )
        assert "\nThe " in done.stdout  # the sample
        return found, done.stdout

    mesh = "--mesh", "2,2,2"
    want, printed = losses(*mesh)
    assert list(want) == ["3", "6"]
    assert "2 blocks, 10,944 parameters; 2 stages, 8 devices, scan" in printed
    shutil.rmtree(tmp_path / "6")
    # Another executor goes on where that one was, with four devices for a stage too.
    again, printed = losses("--executor", "placed", *mesh)
    assert "going on from step 3" in printed
    assert again == {"6": want["6"]}
    # Text is written with what has been trained.
    some = ["--prompt", "A", "--sequences", 4, "--count", 5, "--checkpoints", tmp_path]
    done = run("examples/generate_lm.py", *some)
    assert done.returncode == 0, done.stderr
    assert "4 sequences of 5 bytes, in 2 groups; layers per stage [2, 2]" in done.stdout
    assert "100.0% of the bytes are those that one device writes" in done.stdout
    assert done.stdout.startswith("A")
    for devices in ("2 devices", "1 device"):
        assert re.search(
            rf"^ *{devices}: [\d,]+ bytes a sec", done.stdout, re.MULTILINE
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "5"], "--stages 5: the model has 4 blocks"),
        (["--mesh", "2,2"], "argument --mesh: invalid sizes value: '2,2'"),
        (["--mesh", "2,3,1"], "--mesh: 3 devices share the 8 rows of a microbatch"),
        (["--mesh", "2,1,3"], "--mesh: 3 devices share the 4 heads"),
    ],
)
def test_wrong_flags_of_the_language_model_get_one_line(inside, arguments, message):
    done = inside("examples/train_lm.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.fixture
def language_model(monkeypatch):
    """What the scripts of the language model define."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return [
        argparse.Namespace(**runpy.run_path(str(ROOT / "examples" / name)))
        for name in ("train_lm.py", "generate_lm.py")
    ]


def test_what_is_generated_is_what_the_trained_modules_say(language_model):
    """The functions of one place at a time are the Flax modules of all places."""
    train, generate = language_model
    shape = argparse.Namespace(blocks=2, width=8, heads=2, context=8, seed=0)
    # Biases begin with 0, and the same everywhere would not show a mistake.
    params = jax.tree.map(
        lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape),
        generate.random_params(shape),
    )
    prompt = np.array([[84, 104, 101], [73, 102, 32]], np.int32)
    layers = generate.layers_of(generate.by_layer(params), 0.0)
    keys = jax.random.split(jax.random.key(0), 2)
    own = generate.by_layer(params)
    written = generate.on_one_device(layers, own, prompt, keys, 5)()
    model = train.model_of(argparse.Namespace(**vars(shape), dropout=0.0))
    scores = jax.jit(model.apply)
    seen = np.zeros((2, 8), np.int32)
    seen[:, :3] = prompt
    for n in range(3, 8):
        seen[:, n] = np.asarray(scores({"params": params}, seen))[:, n - 1].argmax(-1)
    assert written.tokens.tolist() == seen[:, 3:].tolist()


def test_the_generator_refuses_what_does_not_fit(inside, language_model, tmp_path):
    for arguments, message in [
        (["--groups", "3"], "--groups 3: a divisor of the 16 sequences"),
        (["--prompt", ""], "--prompt: at least one byte"),
        (["--count", "-1"], "--count -1: at least 0"),
    ]:
        done = inside("examples/generate_lm.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
    _, generate = language_model
    params = [{"places": np.zeros((64, 8))}, None, None]
    given = {"stages": 1, "prompt": "The ", "count": 0}
    assert generate.bytes_to_write(argparse.Namespace(**given), params) == 61
    for changed, message in [
        ({"stages": 2}, "--stages 2: the model has only 1 block"),
        (
            {"count": 62},
            "--count 62 after a prompt of 4 bytes: the model sees 64",
        ),
        (
            {"prompt": "é" * 33},
            "--count 0 after a prompt of 66 bytes: the model sees 64",
        ),
    ]:
        with pytest.raises(SystemExit, match=re.escape(message)):
            generate.bytes_to_write(argparse.Namespace(**(given | changed)), params)
    with pytest.raises(SystemExit, match="no checkpoint is there"):
        generate.load(tmp_path)


def test_the_resnet_trains_with_running_statistics():
    small = [
        "--layers",
        "8",
        "--width",
        "8",
        "--stages",
        "2",
        "--batch",
        "64",
        "--chunks",
        "2",
        "--checkpoint",
        "always",
    ]
    done = run("examples/train_resnet.py", *small, "--steps", "80")
    assert done.returncode == 0, done.stderr
    right = re.search(r"held-out digits: (\S+)% of 360 are read right", done.stdout)
    assert right
    assert float(right[1]) > 40  # chance is 10
    assert "ResNet-8: 24 layers in 2 stages" in done.stdout
    assert re.search(
        r"^2 skips, [01] of them from one stage to another$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^device 0 F0", done.stdout, re.MULTILINE)
    assert "loss=" in done.stderr


@pytest.mark.parametrize(
    ("layers", "count", "skips"),
    [(26, 84, 8), pytest.param(101, 334, 33, marks=pytest.mark.full)],
)
def test_a_deep_resnet_has_a_skip_for_each_of_its_blocks(inside, layers, count, skips):
    done = inside("examples/train_resnet.py", "--layers", layers, "--steps", "0")
    assert done.returncode == 0, done.stderr
    assert f"ResNet-{layers}: {count} layers in 4 stages" in done.stdout
    assert re.search(
        rf"^{skips} skips, [1-3] of them from one stage to another$",
        done.stdout,
        re.MULTILINE,
    )
    assert "held-out" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "12"], "invalid choice: 12"),
        (["--steps", "-1"], "--steps -1: at least 0"),
        (["--stages", "99"], "--stages 99: the model has only 44 layers"),
        (["--batch", "9999"], "--batch 9999: there are only 1437 images to train on"),
    ],
)
def test_wrong_flags_of_the_resnet_get_one_line(inside, arguments, message):
    done = inside("examples/train_resnet.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


# --- a model that others wrote ---


def run_any(inside, folder, *arguments):
    """Four steps of a small model, as many as no checkpoint has, and what is said."""
    small = ["--depth", 1, "--width", 8, "--heads", 2, "--stages", 4, "--batch", 8]
    small += ["--steps", 4, "--every", 2, "--checkpoints", folder / "saved"]
    small += ["--out", folder / "digits.png"]
    with jax.numpy_dtype_promotion("standard"):
        done = inside("examples/train_any.py", *small, *arguments)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"step (\d): loss (\S+), held-out loss (\S+)", done.stdout)
    return {int(step): (float(a), float(b)) for step, a, b in losses}, done.stdout


def test_a_model_of_somebody_else_trains_and_draws(inside, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")
    want, printed = run_any(inside, tmp_path)
    assert list(want) == [2, 4]
    assert "vision transformer, depth 1, 1,162 parameters" in printed
    assert re.search(r"^ +3  .* [kM]?FLOP +\d", printed, re.MULTILINE)
    assert "placed, eager_1f1b, 4 microbatches; plan: bubble" in printed
    assert re.search(r"held-out digits: \S+% of 360 are read right", printed)
    picture = tmp_path / "digits.png"
    assert matplotlib.image.imread(picture).shape[:2] == (600, 1000)
    # The model's own loop goes on where the pipeline was.
    shutil.rmtree(tmp_path / "saved" / "4")
    picture.unlink()
    again, printed = run_any(inside, tmp_path, "--executor", "plain")
    assert "going on from step 2" in printed
    assert list(again) == [4]
    np.testing.assert_allclose(again[4], want[4], atol=1.5e-4)
    assert picture.exists()


def test_the_model_of_somebody_else_knows_nothing_of_pipelines():
    text = (ROOT / "examples/vision_transformer.py").read_text()
    assert re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE) == [
        "jax.numpy",
        "flax",
    ]
