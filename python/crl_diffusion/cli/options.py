"""The options of each command. tyro turns these classes into a parser and their docstrings into `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from crl_diffusion.config.presets import PresetName
from crl_diffusion.config.settings import Device, ExtractorName, RunConfig, Settings

Launcher = Literal["local", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Train one method with one seed. To resume an interrupted run, give the same command again. A finished run is not
    changed."""

    out: Path
    """Folder of the run."""
    preset: PresetName = "demo"
    """Named set of settings. Other options override it. `crl-diffusion list` shows the settings of each preset."""
    data_root: Path = Path("data")
    """Folder of the data sets, in the layout of torchvision (MNIST/raw/...), or of your images. Not needed for
    digits."""
    extractor: ExtractorName = "cnn"
    """Network that provides the features for the FID. cnn and lenet are small classifiers, trained on the data set
    first. inception is the network of the literature; you download its weights. Accuracies always come from cnn."""
    extractor_folder: Path | None = None
    """Folder for trained extractors and for statistics of real images. For inception, put its weights here:
    pt_inception-2015-12-05-6726825d.pth. By default <out>."""


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Train several methods with several seeds, and report them in one table and in pictures. Each run is a process of
    its own."""

    out: Path
    """Folder of the comparison. Each run gets a folder in it. You can add methods and seeds later."""
    preset: PresetName = "demo"
    """Named set of settings, methods and seeds. Other options override it. `crl-diffusion list` shows the presets."""
    methods: tuple[str, ...] = ("fine-tune", "gd", "gd+rank1")
    """Methods to compare, each as NAME or NAME:OPTION,... as for `train --method`. The options once, alone,
    preconditioned, damping, random and signs are controls for experiments, not methods to use. METHOD@ema=NUMBER and
    METHOD@lr-later=NUMBER are variants of a method, with a value of --ema or --lr-later of their own:
    gd gd@ema=0.999."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds. Each method is run once with each of them."""
    lams: tuple[float, ...] = ()
    """Values of lam, the strength of the penalty. Every method that has a penalty is run once with each value. By
    default each method uses its own."""
    jobs: int = 0
    """Number of runs at the same time. 0 means one for each CPU core or, on a CUDA device, one; with --launcher slurm,
    as many as Slurm starts."""
    launcher: Launcher = "local"
    """Where the runs are made. local: as processes of this machine. slurm: each run is a job of Slurm, submitted
    through submitit; compare waits for the jobs, which go on if it is ended."""
    slurm: tuple[str, ...] = ()
    """Options of sbatch for the job of one run, as KEY=VALUE: partition=gpu gres=gpu:1 time=12:00:00 account=lab. By
    default time=4:00:00 and cpus-per-task=1. A run that reaches its time limit is queued again and continues."""
    baseline: str = "gd"
    """Method, or variant of one, that the others are compared with. Differences are paired by seed and need two seeds
    or more."""
    data_root: Path = Path("data")
    """Folder of the data sets, in the layout of torchvision (MNIST/raw/...), or of your images. Not needed for
    digits."""
    extractor: ExtractorName = "cnn"
    """Network that provides the features for the FID. cnn and lenet are small classifiers, trained on the data set
    first. inception is the network of the literature; you download its weights. Accuracies always come from cnn."""
    extractor_folder: Path | None = None
    """Folder for trained extractors and for statistics of real images. For inception, put its weights here:
    pt_inception-2015-12-05-6726825d.pth. By default <out>."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make the table and pictures from existing runs. Nothing is trained."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that contain run folders, as written by `train` or `compare`."""
    out: Path | None = None
    """Folder for the report. By default the first of the given folders."""
    baseline: str = "gd"
    """Method, or variant of one, that the others are compared with. Differences are paired by seed and need two seeds
    or more."""


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Is rank 1 enough for a trained model? Measures its Fisher matrix at single timesteps and over all timesteps.
    Nothing is trained."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, as written by `train`. Its newest checkpoint is used."""
    task: int | None = None
    """Use only the images of this task. Tasks are counted from 1. By default all tasks that the model has learnt."""
    samples: int = 256
    """Per-sample gradients at each timestep, at least 48. One backward pass holds all of them, so memory limits
    them."""
    timesteps: tuple[int, ...] = ()
    """Timesteps to measure, from 0 to 999. By default 20 100 300 500 700 900 980."""
    seed: int = 0
    """Random seed for the choice of images, the noise and the uniform timesteps."""
    out: Path | None = None
    """Folder for the report. By default <run>/diagnosis."""
    data_root: Path | None = None
    """Folder of the data sets, if it is not where it was when the run was begun."""
    device: Device = "auto"
    """Device. auto means CUDA if a CUDA device is available, otherwise the CPU."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images with a trained model: PNG files and a sheet of all classes. Nothing is trained."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, as written by `train`. Its newest checkpoint is used, with the weights that an evaluation uses."""
    out: Path
    """Folder for the images. It must be new or empty, or have been written by the same command."""
    classes: tuple[str, ...] = ()
    """Classes to draw: names, numbers from 0, or ranges of numbers such as 0-4. A name comes before a number. By
    default all classes that the model has learnt."""
    count: int = 8
    """Images of each class. With a larger number the first images are the same."""
    seed: int = 0
    """Random seed of the images."""
    steps: int | None = None
    """DDIM steps, from 1 to 1000. By default --eval-steps of the run. More take longer and usually draw better. Choose
    a divisor of 1000: with other numbers the first step is not at the noisiest timesteps."""
    task: int | None = None
    """Use the weights of the end of this task. Tasks are counted from 1. By default the newest checkpoint."""
    device: Device = "auto"
    """Device. auto means CUDA if a CUDA device is available, otherwise the CPU."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained UNet as a folder that diffusers loads without this package."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, as written by `train`. Its newest checkpoint is used, with the weights that an evaluation uses."""
    out: Path
    """Folder for the model. It must be new or empty, or have been written by the same command."""
    task: int | None = None
    """Use the weights of the end of this task. Tasks are counted from 1. By default the newest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class List:
    """List the data sets, models, methods and presets with their numbers."""

    markdown: bool = False
    """Print Markdown: the content of python/PRESETS.md."""


Command = Train | Compare | Report | Diagnose | Sample | Export | List
