"""Make .venv at the repository's root and install tpinfer into it, once. Standard library only.

    python3 launch/setup.py --extras run,test

Finds a Python of at least 3.11, keeps torch's CUDA build (gigabytes) off machines without a GPU,
builds the native collectives this CPU can use, and leaves a stamp, so that a second call has
nothing to do. Does not touch anything outside .venv, and takes indexes, mirrors and certificates
from pip's own configuration.

    TPINFER_TORCH_INDEX   index for torch's CPU build, in place of PyTorch's

Old interpreters must be able to read this file up to their refusal: annotations beyond plain names
are quoted.
"""

import argparse
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tpinfer-setup.json"
OLDEST, NEWEST = (3, 11), (3, 16)
TORCH = "2.13.0"
TORCH_RANGE = "torch>=2.11,<2.16"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_EXTRAS = {"run", "test"}


class SetupError(Exception):
    """The message says what failed and what to do."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def run(command: "list[str]", advice: str) -> str:
    """Run quietly and return the output. Raises SetupError with its last lines and the advice."""
    found = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    if found.returncode != 0:
        tail = "\n".join(found.stdout.strip().splitlines()[-15:])
        raise SetupError(f"`{' '.join(command)}` failed:\n{tail}\n{advice}")
    return found.stdout


def find_python() -> "str | None":
    """A Python on PATH that is new enough, newest first."""
    for minor in range(NEWEST[1] - 1, OLDEST[1] - 1, -1):
        path = shutil.which(f"python3.{minor}")
        # A version manager's shim exists for versions that are not active: only a run tells.
        if path and subprocess.call([path, "-c", "import venv"], stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def require_python() -> None:
    """Go on under a newer Python when this one is too old. Raises SetupError when there is none."""
    if sys.version_info >= OLDEST:
        return
    newer = find_python()
    if newer is None:
        raise SetupError(
            f"tpinfer needs Python 3.11 or newer and this is {platform.python_version()}; install "
            "one (Debian, Ubuntu: apt install python3.11 python3.11-venv) and run this again"
        )
    os.execv(newer, [newer, *sys.argv])


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, from the driver's device files or, where they differ, its own
    tool.
    """
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return listed.returncode == 0 and b"GPU " in listed.stdout


def fingerprint(gpu: bool) -> str:
    """Changes whenever the environment would have to be made anew."""
    digest = hashlib.sha256()
    for part in (ROOT / "pyproject.toml", Path(__file__).resolve()):
        digest.update(part.read_bytes())
    digest.update(repr((sys.version_info[:2], str(ROOT), gpu)).encode())
    return digest.hexdigest()


def installed_extras(print_of_now: str) -> "set[str] | None":
    """Extras of a finished set-up that still holds, or None."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None
    if stamp.get("fingerprint") != print_of_now or not PYTHON.exists():
        return None
    return set(stamp.get("extras", ()))


def ask_venv(code: str) -> "str | None":
    """What .venv's Python prints for `code`, or None when it cannot."""
    try:
        found = subprocess.run(
            [str(PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    return found.stdout.decode().strip() if found.returncode == 0 else None


def make_venv() -> None:
    """Create .venv with pip, or keep one of the same Python version."""
    version = "{}.{}".format(*sys.version_info[:2])
    if ask_venv("import sys, pip; print('{}.{}'.format(*sys.version_info[:2]))") == version:
        return
    say(f"making .venv with Python {version}")
    advice = (
        "Python cannot make virtual environments here; install the missing part "
        f"(Debian, Ubuntu: apt install python{version}-venv) and run this again"
    )
    run([sys.executable, "-m", "venv", "--clear", str(VENV)], advice)


def pip(arguments: "list[str]", advice: str) -> str:
    return run(
        [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments], advice
    )


def installed_torch() -> "str | None":
    """Version of torch in .venv."""
    return ask_venv("from importlib.metadata import version; print(version('torch'))")


def find_links_of(configuration: str) -> "list[Path]":
    """Local directories in the `find-links` lines of `pip config list`, which include
    PIP_FIND_LINKS.
    """
    places = []
    for value in re.findall(r"^\S*find-links=(.*)$", configuration, re.MULTILINE):
        for entry in value.strip().strip("'\"").replace("\\n", " ").split():
            path = entry[len("file://") :] if entry.startswith("file://") else entry
            if Path(path).is_dir():
                places.append(Path(path))
    return places


def find_cpu_wheel(places: "list[Path]", tag: str, machine: str) -> "Path | None":
    """A CPU build of the pinned torch for the Python `tag` (cp311) and `machine` (x86_64) in one of
    `places`.
    """
    pattern = re.compile(
        rf"torch-{re.escape(TORCH)}(\+|%2B)cpu[^-]*-{tag}-{tag}-[^-]*{re.escape(machine)}\.whl"
    )
    for place in places:
        for path in sorted(place.iterdir()):
            if pattern.fullmatch(path.name):
                return path
    return None


def install_torch(gpu: bool) -> None:
    """Install torch alone: its CUDA build on a GPU, otherwise only ever a CPU build.

    The rest of its dependencies comes with tpinfer's own, from wherever pip is set up to look.
    """
    if installed_torch():
        return
    if gpu:
        say("GPU found: installing torch with CUDA (a few GB)")
        pip(
            ["install", TORCH_RANGE],
            "check the network and pip's configuration, then run this again",
        )
        return
    tag = "cp{}{}".format(*sys.version_info[:2])
    places = find_links_of(pip(["config", "list"], "repair pip's configuration files"))
    wheel = find_cpu_wheel(places, tag, platform.machine())
    if wheel is not None:
        say(f"no GPU: installing torch from {wheel}")
        pip(["install", "--no-deps", str(wheel)], "remove the damaged file and run this again")
        return
    index = os.environ.get("TPINFER_TORCH_INDEX")
    say(f"no GPU: installing torch's CPU build (about 200 MB) from {index or CPU_INDEX}")
    # Only a CPU build carries +cpu: whatever other indexes pip knows, it cannot pick another one.
    pin = f"torch=={TORCH}" if index else f"torch=={TORCH}+cpu"
    pip(
        ["install", "--no-deps", "--index-url", index or CPU_INDEX, pin],
        "set TPINFER_TORCH_INDEX to an index that has torch's CPU build, or put its wheel into a "
        "directory named by PIP_FIND_LINKS, then run this again",
    )


def install_package(extras: "set[str]") -> None:
    """Install tpinfer in place with `extras`; the installed torch stays, whatever they ask for."""
    names = ",".join(sorted(extras))
    say(f"installing tpinfer[{names}]")
    arguments = ["install", "--editable", f".[{names}]"]
    with tempfile.TemporaryDirectory() as directory:
        version = installed_torch()
        if version is not None:
            kept = Path(directory, "constraints.txt")
            kept.write_text(f"torch=={version}\n")
            arguments += ["--constraint", str(kept)]
        pip(arguments, "check the network and pip's configuration, then run this again")


def packages_of(extra: str) -> "list[str]":
    """What pyproject.toml lists under an extra."""
    import tomllib  # Python 3.11; older ones have been left behind by now

    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"][extra]


def deepspeed_can_be_used() -> bool:
    """DeepSpeed's shared-memory all-reduce is written for AVX-512 and compiled here."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return {"avx512f", "avx512bw"} <= flags and shutil.which("g++") is not None


def build_natives(gpu: bool) -> None:
    """Compile what makes CPU collectives and attention fast. Nothing depends on it: a failure is
    told and passed over.
    """
    modules = [
        "tpinfer.collectives.build_ring",
        "tpinfer.attention.native_decode",
        "tpinfer.decoding.native_passes",
    ]
    if not gpu and deepspeed_can_be_used():
        try:
            say("installing DeepSpeed for its CPU collective")
            # Its set-up looks at the installed torch, which an isolated build would not see.
            pip(["install", "setuptools>=77", "wheel"], "")
            version = installed_torch() or TORCH
            # By name: naming tpinfer itself here would replace its editable install.
            wanted = packages_of("cpu-collectives")
            pip(["install", "--no-build-isolation", *wanted, f"torch=={version}"], "")
            modules.append("tpinfer.machine.build_deepspeed")
        except SetupError as error:
            say(f"going on without DeepSpeed: {str(error).strip()}")
    for module in modules:
        try:
            lines = (
                run([str(PYTHON), "-m", module], "slower ones will be used").strip().splitlines()
            )
            say(lines[-1] if lines else f"{module} done")
        except SetupError as error:
            say(f"not fatal: {str(error).strip()}")


def set_up(extras: "set[str]") -> None:
    """Bring .venv to where it has `extras`, doing only what is missing."""
    gpu = has_gpu()
    print_of_now = fingerprint(gpu)
    present = installed_extras(print_of_now)
    if present is not None and extras <= present:
        return
    extras = extras | (present or set())
    make_venv()
    STAMP.unlink(missing_ok=True)
    if extras & TORCH_EXTRAS:
        install_torch(gpu)
    install_package(extras | ({"gpu"} if gpu else set()))
    if extras & TORCH_EXTRAS:
        build_natives(gpu)
    STAMP.write_text(json.dumps({"fingerprint": print_of_now, "extras": sorted(extras)}))
    say(f"ready: {VENV}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv for tpinfer.")
    parser.add_argument("--extras", default="run", help="comma-separated, such as run,test")
    wanted = parser.parse_args().extras
    try:
        require_python()
        with (ROOT / "pyproject.toml").open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # two scripts started at once: one sets up, one waits
            set_up({name.strip() for name in wanted.split(",") if name.strip()})
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
