"""Builds the native kernels in csrc/ that this machine can compile, and prints the reason for each one left out.

    pip install torch "setuptools>=77" ninja && pip install --no-build-isolation .

`pip install .` builds in an environment of its own, and installs a torch of its own there.

Environment:
    CRL_KERNELS_CUDA      auto (default): build the CUDA kernels if nvcc is found; 1: build them or fail; 0: do not
    CRL_KERNELS_PURE_PYTHON  1: build no kernels; 0 (default)
    TORCH_CUDA_ARCH_LIST  GPU architectures, as in PyTorch (default: from 7.5 on); no GPU is needed or probed
    CXX                   the C++ compiler (default: g++ or c++)

Both libraries use PyTorch's stable ABI for torch >= 2.10, so a wheel built beside one torch runs beside another. Beside
them is `_build.json`: the digest of the sources that they were built from, and why there are no CUDA kernels, if so.
`crl_kernels/backends/built.py` reads it.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
write_record = runpy.run_path(str(HERE / "crl_kernels/backends/built.py"))["write_record"]
# A change in one of these rebuilds the libraries.
HEADERS = [
    str(path.relative_to(HERE)) for path in sorted((HERE / "csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".inc")
]
TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10: without it, a build on a newer torch may fail on an older one
ABI3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
TORCH_FIRST = (
    'Type: pip install "torch>=2.10" "setuptools>=77" ninja && pip install --no-build-isolation . '
    "(or set CRL_KERNELS_PURE_PYTHON=1, which installs slow plain PyTorch)"
)


def log(message):
    print(f"crl-kernels: {message}", file=sys.stderr, flush=True)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def set_cuda_home(nvcc):
    """Asks nvcc for its toolkit: torch guesses it from nvcc's path, and is wrong where that is a wrapper script."""
    output = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    if top := re.search(r"TOP=(\S+)", output):
        os.environ["CUDA_HOME"] = os.environ.get("CUDA_HOME") or str(Path(top[1]).resolve())


def nvcc_version(nvcc):
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in re.search(r"release (\d+)\.(\d+)", output).groups())


def architectures(version):
    """Every architecture from Turing on that this nvcc knows, and PTX for later ones.

    8.6 (which 8.9 runs too) and 12.0 beside 8.0 and 10.0, because float64 is slow there: see float64_arithmetic.cuh.
    """
    return "7.5;8.0;8.6;9.0;10.0+PTX;12.0+PTX" if version >= (12, 8) else "7.5;8.0;8.6;9.0+PTX"


def cuda_obstacle(choice, nvcc, torch_cuda):
    """Why the CUDA kernels are not built, and what to do about it; None if they are."""
    if choice == "0":
        return "CRL_KERNELS_CUDA=0."
    if nvcc is None:
        return (
            "nvcc was not found on PATH or in $CUDA_HOME/bin. Install the CUDA toolkit of your torch's CUDA version "
            "(see torch.version.cuda)."
        )
    if torch_cuda is None:
        return "this torch is a CPU build. Install a CUDA build of it."
    if str(nvcc_version(nvcc)[0]) != torch_cuda.partition(".")[0]:
        version = ".".join(map(str, nvcc_version(nvcc)))
        return f"nvcc is of CUDA {version} and torch of CUDA {torch_cuda}. Install a toolkit of torch's major version."
    return None


def environment(name, choices):
    """A variable's value; the first choice if it is unset or empty."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        sys.exit(f"{name}={value!r}: expected {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def finish(package, left_out):
    """Removes the libraries that an earlier build has left and this one leaves out, and writes the record."""
    for name in left_out:
        (package / name).unlink(missing_ok=True)
    write_record(package, left_out)


def pure_python(reason):
    log(f"{reason}. Installing in pure Python: everything works, slowly.")

    class Build(build_py):
        def run(self):
            super().run()
            top = HERE if self.editable_mode else Path(self.build_lib)
            finish(top / "crl_kernels", {"_C.abi3.so": reason, "_C_cuda.abi3.so": reason})

    return [], {"build_py": Build}


def extensions():
    """(ext_modules, cmdclass) for this machine; no modules means a pure-Python installation."""
    choice = environment("CRL_KERNELS_CUDA", ("auto", "1", "0"))
    if environment("CRL_KERNELS_PURE_PYTHON", ("0", "1")) == "1":
        return pure_python("CRL_KERNELS_PURE_PYTHON=1")
    nvcc = find_nvcc()
    if nvcc is not None:
        set_cuda_home(nvcc)  # before torch is imported
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        sys.exit(f"The kernels are compiled against torch, which cannot be imported ({error}). {TORCH_FIRST}")
    if torch.__version__ < "2.10":
        sys.exit(f"This torch is {torch.__version__}; expected 2.10 or later. {TORCH_FIRST}")
    compiler = shutil.which((os.environ.get("CXX") or "g++").split()[0]) or shutil.which("c++")
    missing = None if compiler else "no C++ compiler was found (CXX, g++ or c++)"
    obstacle = f"{missing}." if missing else cuda_obstacle(choice, nvcc, torch.version.cuda)
    if choice == "1" and obstacle:
        sys.exit(f"CRL_KERNELS_CUDA=1 asks for the CUDA kernels, but {obstacle}")
    if missing:
        return pure_python(missing)

    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    # No contraction: a product and a sum are fused where the code says so, whatever the compiler inlines, so that an
    # element's result is the same in every place of a vector and on every instruction set.
    optimise = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
    modules = [
        CppExtension(
            "crl_kernels._C",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc/cpu").glob("*.cpp")),
            include_dirs=[str(HERE / "csrc")],
            depends=HEADERS,
            define_macros=defines,
            extra_compile_args=optimise,
            py_limited_api=True,
        )
    ]
    if obstacle:
        log(f"leaving out the CUDA kernels: {obstacle}")
    else:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed or architectures(nvcc_version(nvcc))
        cuda_module = CUDAExtension(
            "crl_kernels._C_cuda",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc/cuda").glob("*.cu")),
            include_dirs=[str(HERE / "csrc")],
            depends=HEADERS,
            define_macros=[*defines, ("USE_CUDA", None)],
            extra_compile_args={"cxx": optimise, "nvcc": ["-O3", "-std=c++17", "-Xptxas=-warn-spills"]},
            py_limited_api=True,
        )
        # The static runtime, so that the wheel does not need one version of libcudart.so.
        cuda_module.libraries = [name for name in cuda_module.libraries if name != "cudart"]
        cuda_module.libraries += ["cudart_static", "dl", "rt", "pthread"]
        modules.append(cuda_module)

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = "build/objects"  # kept, so that the next build compiles what has changed

        def run(self):
            super().run()
            package = Path(self.get_ext_fullpath("crl_kernels._C")).parent
            finish(package, {"_C_cuda.abi3.so": obstacle} if obstacle else {})

    return modules, {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass, options=ABI3 if ext_modules else {})
