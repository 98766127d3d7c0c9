"""Each command's options, as tyro reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from crl_diffusion.config.presets import PresetName
from crl_diffusion.config.settings import Device, ExtractorName, RunConfig, Settings


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Train one method with one seed. To resume, give the same command again; a finished run is left alone."""

    out: Path
    """Folder of the run."""
    preset: PresetName = "demo"
    """Settings to begin with; options given beside it win. `crl-diffusion list` shows what each stands for."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    extractor: ExtractorName = "cnn"
    """Network whose features FIDs are measured on: cnn and lenet are small classifiers that are trained on the data set
    first; inception is the literature's, whose weights you download. Accuracies are always the cnn's."""
    extractor_folder: Path | None = None
    """Folder where trained extractors and statistics of real images are kept, and where inception's weights are looked
    for, pt_inception-2015-12-05-6726825d.pth; by default <out>."""


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Train several methods with several seeds, one process a core, and put them into one table and pictures."""

    out: Path
    """Folder of the comparison; each run has a folder in it. More methods and seeds can be added to it later."""
    preset: PresetName = "demo"
    """Settings, methods and seeds to begin with; options given beside it win. `crl-diffusion list` shows them."""
    methods: tuple[str, ...] = ("fine-tune", "gd", "gd+rank1")
    """What to compare: NAME or NAME:OPTION,... each."""
    seeds: tuple[int, ...] = (0,)
    """One run of each method for each."""
    lams: tuple[float, ...] = ()
    """One run for each of these strengths, of every method that has a penalty; by default its own."""
    jobs: int = 0
    """Runs at a time; 0 means one a CPU core or, on a CUDA device, one."""
    baseline: str = "gd"
    """With two seeds or more, differences are taken to this method, paired by seed."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    extractor: ExtractorName = "cnn"
    """Network whose features FIDs are measured on: cnn and lenet are small classifiers that are trained on the data set
    first; inception is the literature's, whose weights you download. Accuracies are always the cnn's."""
    extractor_folder: Path | None = None
    """Folder where trained extractors and statistics of real images are kept, and where inception's weights are looked
    for, pt_inception-2015-12-05-6726825d.pth; by default <out>."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Table and pictures from run folders, or from folders that hold run folders; trains nothing."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What `train` or `compare` has written."""
    out: Path | None = None
    """Where to write; by default the first folder."""
    baseline: str = "gd"
    """With two seeds or more, differences are taken to this method, paired by seed."""


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Is rank 1 enough for a trained model? Looks at its Fisher at single timesteps and over all; trains nothing."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run that `train` has written; its newest checkpoint is looked at."""
    task: int | None = None
    """Take only the images of this task, from 1; by default those of all tasks that the model has learnt."""
    samples: int = 256
    """Per-sample gradients at every timestep, at least 48; one backward pass holds them, so memory limits them."""
    timesteps: tuple[int, ...] = ()
    """Timesteps to look at, from 0 to 999; by default 20 100 300 500 700 900 980."""
    seed: int = 0
    """Names the random streams that images, noise and uniform timesteps come from."""
    out: Path | None = None
    """Where to write; by default <run>/diagnosis."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    device: Device = "auto"
    """Where to compute; auto takes a CUDA device if there is one."""


@dataclass(frozen=True, kw_only=True)
class List:
    """Data sets, models, methods and presets with their numbers."""

    markdown: bool = False
    """Print what python/PRESETS.md holds."""


Command = Train | Compare | Report | Diagnose | List
